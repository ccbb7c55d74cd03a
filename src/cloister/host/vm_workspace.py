"""The workspace's disk of a microVM: a fresh ext4 image with what the agent may see of the host's directory.

Done in a child (`vm_fill`), with the user's own rights, by descriptors; no link is followed. What the layout hides is
never opened, so its bytes are on no disk of a guest; what cannot be read, and what is neither file, directory nor link,
is left out. Names that are protected while absent are put there, so that the guest can keep them read-only. Handing
back is for `vm_hand_back`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator

from cloister.errors import RetryError, UnsupportedError
from cloister.host import beneath, e2fs, vm_baseline
from cloister.host.e2fs import Tools
from cloister.host.ext4.encode import BLOCK, Name
from cloister.host.ext4.fill import INODE, Attributes, Filler
from cloister.host.ext4.format import ROOT_INODE
from cloister.host.ext4.tree import MAX_DEPTH, MAX_ENTRIES
from cloister.host.vm_baseline import Baseline, Was
from cloister.host.vm_image import SPARE_BYTES
from cloister.plan.vm_disk import Virtual, held, virtual_names, within
from cloister.plan.workspace import Value, WorkspaceLayout

STRANGER = 65534
"""Who owns on the disk what is not the caller's: nobody (/proc/sys/kernel/overflowuid)."""
SMALL_BYTES = 1 << 16
"""In files up to this size nobody looks for holes."""
WHOLE_BYTES = 1 << 20
"""Files up to this size are read at once."""
INDEXED_BLOCKS = 16
"""Directories with more blocks get an index: from about 1,500 names on."""
MAX_LINKS = 65_000
LARGEST_BYTES = ((1 << 32) - 2) * BLOCK
"""ext4 counts 2^32 blocks of a file, holes among them."""
_PERMISSIONS = 0o777
_KINDS = {"directory": stat.S_IFDIR, "file": stat.S_IFREG, "socket": stat.S_IFSOCK}
_SPARE_INODES = 20_000
_JOURNAL_BYTES = 256 << 20
_LARGEST_BLOCKS = 1 << 32


class WorkspaceDisk(Value, frozen=True):
    """A disk that was made."""

    path: str
    size_bytes: int
    entries: int
    fields: tuple[str, ...]
    """`ro=PATH`, `mask=PATH` and `stand=HEX:PATH`, relative to the workspace, for the guest's begin."""
    notices: tuple[str, ...] = ()
    """What the person should know, one sentence each."""


def make_workspace_disk(  # noqa: PLR0913  # a disk has so many sides
    tools: Tools, layout: WorkspaceLayout, target: str, *, room_bytes: int, uid: int, gid: int,
    tell: Callable[[int, int], None] = lambda _done, _total: None,
) -> WorkspaceDisk:  # fmt: skip
    """Make the file `target`, an image with the workspace, and its baseline beside it; both appear only when whole.

    Args:
        tools: e2fsprogs in their jail.
        layout: which workspace, what is hidden and what is protected.
        target: where to make it; readable by the user only, and sparse.
        room_bytes: what can be written besides what is there.
        uid: the user in the guest to whom the caller's files belong.
        gid: that user's group.
        tell: called with how many names are on the disk, and how many there are.

    Raises:
        UnsupportedError: the workspace is too large or cannot be read, or e2fsprogs cannot make the disk.
        RetryError: it was replaced while it was copied.
    """
    partial = f"{target}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
    try:
        root = beneath.open_root(layout.root)
    except OSError as error:
        raise _unreadable(layout.root, error) from error
    try:
        content, entries = _measure(root, layout.root)
        size = _make_file(tools, partial, content, room_bytes, entries, (uid, gid))
        copier = _Copier(partial, layout, (uid, gid), lambda done: tell(done, entries))
        with contextlib.closing(copier.disk):
            copier.fill(root)
        if copier.largest > INDEXED_BLOCKS:
            e2fs.repair(tools, partial, index=True)
            e2fs.drop_lost_and_found(tools, partial)  # e2fsck makes it anew
        vm_baseline.save(target, _baseline(layout, copier))
        os.rename(partial, target)
    except OSError as error:
        raise _unreadable(layout.root, error) from error
    finally:
        os.close(root)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    fields = tuple(f"{kind}={name}" for kind, name in held(layout))
    return WorkspaceDisk(target, size, len(copier.baseline), fields, tuple(copier.notices()))


def _baseline(layout: WorkspaceLayout, copier: _Copier) -> Baseline:
    protected = [name.partition(":")[2] if kind == "stand" else name for kind, name in held(layout) if kind != "mask"]
    return Baseline(layout.root, copier.baseline, frozenset(copier.kept), tuple(protected), layout.unprotected)


def _unreadable(root: str, error: OSError) -> UnsupportedError | RetryError:
    where = f"{root}: {os.fsdecode(error.filename)}" if error.filename else root
    if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENOENT}:
        return RetryError("workspace-changing", "the workspace is being replaced while it is copied", where=where)
    return UnsupportedError(
        "vm-workspace", f"the workspace cannot be copied for a virtual machine: {error.strerror}", where=where,
        remedy="cloister gc, or make room in ~/.local/state" if error.errno == errno.ENOSPC else "",
    )  # fmt: skip


def _make_file(  # noqa: PLR0913  # all that decides its size
    tools: Tools, path: str, content: int, room: int, entries: int, owner: tuple[int, int]
) -> int:
    """Make the empty image; return its size. Journal and tables of inodes come on top of what is asked for."""
    size = content + room + entries * INODE * 2 + _JOURNAL_BYTES
    size = size + size // 50 >> 20 << 20
    if size // BLOCK >= _LARGEST_BLOCKS:
        raise UnsupportedError("vm-workspace", "the workspace and its room are larger than a disk can be", where=path)
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        free = os.fstatvfs(opened)
        if content + SPARE_BYTES > free.f_bavail * free.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(opened, size)
    finally:
        os.close(opened)
    e2fs.make(tools, path, inodes=max(entries + _SPARE_INODES, size >> 14), owner=owner, growing=False)
    return size


def _measure(root: int, shown: str) -> tuple[int, int]:
    """Return how many bytes a tree has, holes left out and ends of files rounded up, and how many entries.

    Raises:
        UnsupportedError: there are too many, or too deep.
    """
    content = entries = 0
    waiting = [("", 0)]
    while waiting:
        place, depth = waiting.pop()
        try:
            opened = beneath.open_directory(root, place)
        except OSError:
            continue
        try:
            with os.scandir(opened) as found:
                for entry in found:
                    entries += 1
                    with contextlib.suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        content += min(status.st_blocks * 512, status.st_size) // BLOCK * BLOCK + 2 * BLOCK
                        if stat.S_ISDIR(status.st_mode):
                            waiting.append((f"{place}/{entry.name}" if place else entry.name, depth + 1))
        finally:
            os.close(opened)
        if entries > MAX_ENTRIES or depth >= MAX_DEPTH:
            message = f"the workspace has more than {MAX_ENTRIES} entries or {MAX_DEPTH} levels"
            raise UnsupportedError("vm-workspace", message, where=shown, remedy="choose a smaller directory")
    return content, entries


class _Copier:
    """One workspace on its way into an image."""

    def __init__(self, path: str, layout: WorkspaceLayout, owner: tuple[int, int], tell: Callable[[int], None]) -> None:
        self.disk = Filler(path, time.time_ns())
        self.baseline: dict[bytes, Was] = {}
        self.kept: list[bytes] = []
        self.largest = 0
        self._special = 0
        self._unreadable = 0
        self._other_names = 0
        self._hidden = {mount.node.identity for mount in layout.mounts if mount.op == "mask"}
        """Device and inode: what is hidden is not shown under another name either, or where it was moved to."""
        self._outside = [mount.target for mount in layout.mounts if not within(mount.target, layout.root)]
        self._owner, self._tell = owner, tell
        self._me = os.geteuid()
        self._virtual = virtual_names(layout)
        self._linked: dict[tuple[int, int], list[int]] = {}

    def fill(self, root: int) -> None:
        """Write everything, then what counts it."""
        status = os.fstat(root)
        self._directory(root, b"", ROOT_INODE, ROOT_INODE, self._attributes(status), 0)
        for number, links in self._linked.values():
            self.disk.set_links(number, links)
        self.disk.finish()

    def notices(self) -> Iterator[str]:
        """Yield what was left out."""
        if self._unreadable:
            yield f"{self._unreadable} files of the workspace are not yours to read: the virtual machine lacks them"
        if self._other_names:
            yield f"{self._other_names} other names of hidden files are not in the virtual machine either"
        if self._special:
            yield f"{self._special} sockets, FIFOs, devices or huge files are not in the virtual machine"
        if self._outside:
            yield f"not in the virtual machine, since outside of the workspace: {', '.join(sorted(set(self._outside)))}"

    def _attributes(self, status: os.stat_result) -> Attributes:
        uid, gid = self._owner if status.st_uid == self._me else (STRANGER, STRANGER)
        return Attributes(
            stat.S_IFMT(status.st_mode) | (status.st_mode & _PERMISSIONS), uid, gid, status.st_mtime_ns,
            status.st_ctime_ns,
        )  # fmt: skip

    def _directory(self, opened: int, place: bytes, number: int, parent: int, how: Attributes, depth: int) -> None:  # noqa: PLR0913  # what is known on the way down
        """Write what is in an open directory, then the directory."""
        if depth > MAX_DEPTH:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(place))
        names: list[Name] = []
        virtual = self._virtual.get(place, {})
        for text in sorted(os.listdir(opened)):
            name = os.fsencode(text)
            if name in virtual and virtual[name].replaces:
                self.kept.append(_join(place, name))
                continue
            try:
                names += self._entry(opened, text, place, number, depth)
            except FileNotFoundError:
                continue  # it may go while it is looked at
            except PermissionError:
                self._unreadable += 1
                self.kept.append(_join(place, name))
        there = {name.name for name in names}
        for name, made in virtual.items():
            if name not in there:
                names.append(self._made(_join(place, name), name, made, number))
        self._finish_directory(place, (number, parent), how, names)

    def _finish_directory(
        self, place: bytes, numbers: tuple[int, int], how: Attributes, names: list[Name], *, given: bool = True
    ) -> None:
        links = 2 + sum(name.kind == "directory" for name in names)
        how = how._replace(links=links if links < MAX_LINKS else 1)  # "dir_nlink": 1 means many
        self.largest = max(self.largest, self.disk.put_directory(*numbers, how, names))
        if place:
            self._note(place, numbers[0], how, 0, given=given)

    def _entry(self, opened: int, text: str, place: bytes, parent: int, depth: int) -> list[Name]:
        status = os.stat(text, dir_fd=opened, follow_symlinks=False)
        name = os.fsencode(text)
        path = _join(place, name)
        if stat.S_ISLNK(status.st_mode):
            return [self._link(os.fsencode(os.readlink(text, dir_fd=opened)), name, path, status)]
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            self._special += name not in self._virtual.get(place, {})  # there may be a placeholder of another run
            return []
        if stat.S_ISDIR(status.st_mode):
            below = beneath.open_directory(opened, text)
        else:
            below = os.open(text, beneath.FILE_FLAGS, dir_fd=opened)
        try:
            status = os.fstat(below)
            if (status.st_dev, status.st_ino) in self._hidden:
                self._other_names += 1
                self.kept.append(path)
                return []
            if stat.S_ISDIR(status.st_mode):
                number = self.disk.number(directory=True)
                self._directory(below, path, number, parent, self._attributes(status), depth + 1)
                return [Name(name, number, "directory")]
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_BYTES:
                self._special += 1
                self.kept.append(path)
                return []
            return [self._file(below, name, path, status)]
        finally:
            os.close(below)

    def _link(self, target: bytes, name: bytes, path: bytes, status: os.stat_result) -> Name:
        number = self.disk.number()
        how = self._attributes(status)
        self.disk.put_link(number, how, target)
        self._note(path, number, how, len(target))
        return Name(name, number, "symlink")

    def _file(self, opened: int, name: bytes, path: bytes, status: os.stat_result) -> Name:
        how = self._attributes(status)
        key = (status.st_dev, status.st_ino)
        linked = self._linked.get(key)
        if linked and linked[1] < MAX_LINKS:
            linked[1] += 1
            self._note(path, linked[0], how, status.st_size)
            return Name(name, linked[0], "file")
        number = self.disk.number()
        if status.st_nlink > 1:
            self._linked[key] = [number, 1]
        size = status.st_size
        if size <= SMALL_BYTES or (size <= WHOLE_BYTES and status.st_blocks * 512 >= size):
            data = os.read(opened, size) if size else b""
            size = len(data)
            self.disk.put_bytes(number, how, data)
        else:
            self.disk.put_file(number, how, opened, size, _parts(opened, size))
        self._note(path, number, how, size)
        return Name(name, number, "file")

    def _made(self, path: bytes, name: bytes, made: Virtual, parent: int) -> Name:
        """Write something that the host does not have there."""
        number = self.disk.number(directory=made.kind == "directory")
        how = Attributes(_KINDS[made.kind] | made.mode, 0, 0, self.disk.now_ns, self.disk.now_ns)
        if made.kind == "socket":
            self.disk.put_socket(number, how)
            self._note(path, number, how, 0, given=False)
            return Name(name, number, "socket")
        if made.kind == "file":
            self.disk.put_bytes(number, how, made.content)
            self._note(path, number, how, len(made.content), given=False)
            return Name(name, number, "file")
        below = self._virtual.get(path, {}) if not made.replaces else {}
        names = [self._made(_join(path, name), name, one, number) for name, one in below.items()]
        self._finish_directory(path, (number, parent), how, names, given=False)
        return Name(name, number, "directory")

    def _note(self, path: bytes, number: int, how: Attributes, size: int, *, given: bool = True) -> None:
        self._tell(len(self.baseline))
        self.baseline[path] = Was(number, how.mode, size, how.mtime_ns, how.ctime_ns, given)


def _join(place: bytes, name: bytes) -> bytes:
    return place + b"/" + name if place else name


def _parts(opened: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks of a file that are no hole: first and number, rising, never the same block twice."""
    at = done = 0
    while at < size:
        try:
            at = os.lseek(opened, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(opened, at, os.SEEK_HOLE), size)
        first, last = max(at // BLOCK, done), -(-end // BLOCK)
        if last > first:
            yield first, last - first
            done = last
        at = end
