"""What differs between a guest's disk and what it was given, written as an overlay's upper directory. Done in a child.

The guest is hostile and so is its disk: it is read by `ext4`, never mounted; only regular files, directories and links
come back, as the user's own, without set-id bits, and no more of them than there is room for. Everything is reached by
descriptors: whoever does this needs no path (`disk_work`). Nothing is judged here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from cloister.errors import UnsupportedError
from cloister.host import beneath
from cloister.host.ext4 import tree
from cloister.host.ext4.format import Inode
from cloister.host.ext4.image import Image
from cloister.host.sparse import write_at
from cloister.host.vm_baseline import Baseline, Was

WHITEOUT = "user.overlay.whiteout"
_PERMISSIONS = 0o777
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOST = b"lost+found"


class Back:
    """One hand-back under way."""

    def __init__(  # noqa: PLR0913  # what is compared, where it goes, and how much of it
        self, image: Image, baseline: Baseline, target: int, *, root: int, room: int, most: int,
        tell: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """Take open things.

        Args:
            image: the guest's disk.
            baseline: what it held at the start.
            target: an empty directory.
            root: the workspace on the host, of which only modes are asked; -1 where it is gone.
            room: bytes that may be written.
            most: so many changes at most.
            tell: called with how many names were looked at, and how many there were at the start.
        """
        self.changes = 0
        self._image = image
        self._was = dict(baseline.entries)
        self._root, self._most, self._tell = root, most, tell
        self._done, self._total = 0, len(baseline.entries)
        self._kept = baseline.kept
        self._above_kept = {above for path in baseline.kept for above in _above(path)}
        self._target = target
        self._room = room
        self._directories: dict[bytes, tuple[int, bool]] = {b"": (0, True)}
        """Mode of each directory of the guest's, and whether it is as it was."""
        self._made: set[bytes] = {b""}
        self._linked: dict[int, bytes] = {}
        self._holder = (b"", os.dup(target))
        self._left_out: list[bytes] = []

    def close(self) -> None:
        """Close what is open."""
        os.close(self._holder[1])

    def write(self) -> None:
        """Compare, and write what differs; then give directories their modes, deepest first."""
        for path, inode in tree.walk(self._image):
            self._done += 1
            self._tell(self._done, self._total)
            was = self._was.pop(path, None)
            if self._untouchable(path):
                if not (was and (inode.is_directory or _same(inode, was))) and not path.startswith(_LOST):
                    self._left_out.append(path)
                continue
            if inode.is_directory:
                self._directory(path, inode, was)
            elif not (was and _same(inode, was)):
                self._differs(path, inode, was)
        for path in self._gone():
            self._whiteout(path)
        for path in sorted(self._made - {b""}, reverse=True):
            self._finish(path)

    def notices(self) -> Iterator[str]:
        """Yield what was not handed back."""
        if self._left_out:
            shown = ", ".join(os.fsdecode(path) for path in self._left_out[:5])
            more = f" and {len(self._left_out) - 5} more" if len(self._left_out) > 5 else ""  # noqa: PLR2004
            yield f"not handed back, since it is no file, or hides one of yours: {shown}{more}"

    def _untouchable(self, path: bytes) -> bool:
        """Whether something lies where the host has what the guest never saw, or is e2fsck's own."""
        if path == _LOST or path.startswith(_LOST + b"/"):
            return path not in self._was
        return bool(self._kept) and (path in self._kept or any(above in self._kept for above in _above(path)))

    def _directory(self, path: bytes, inode: Inode, was: Was | None) -> None:
        same = was is not None and stat.S_ISDIR(was.mode) and was.mode == inode.mode
        self._directories[path] = (inode.mode & _PERMISSIONS, same)
        if not same:
            self._count()
            self._make(path)

    def _differs(self, path: bytes, inode: Inode, was: Was | None) -> None:
        replaces = was is not None and stat.S_ISDIR(was.mode) and path in self._above_kept
        if replaces or not (inode.is_file or inode.is_link):
            self._left_out.append(path)
            return
        self._count()
        holder, name = self._place(path)
        if inode.is_link:
            os.symlink(tree.link(self._image, inode), name, dir_fd=holder)
            return
        first = self._linked.get(inode.number)
        if first is not None:
            os.link(first, name, src_dir_fd=self._target, dst_dir_fd=holder, follow_symlinks=False)
            return
        made = os.open(name, _NEW, 0o600, dir_fd=holder)
        try:
            self._copy(made, inode)
        finally:
            os.close(made)
        self._linked[inode.number] = path  # whatever it says of its links: what is named twice is written once

    def _copy(self, made: int, inode: Inode) -> None:
        end = 0
        for at, data in tree.contents(self._image, inode):
            self._tell(self._done, self._total)
            self._room -= len(data)
            if self._room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_at(made, data, at)
            end = at + len(data)
        if end < inode.size:
            os.ftruncate(made, inode.size)
        os.fchmod(made, inode.mode & _PERMISSIONS)
        with contextlib.suppress(OSError, OverflowError):  # a time that this file system cannot keep
            os.utime(made, ns=(inode.mtime_ns, inode.mtime_ns))

    def _gone(self) -> Iterator[bytes]:
        """Yield the topmost names that are no more; one with something of the host's below goes by parts."""
        for path in sorted(self._was):
            if path in self._kept:
                continue
            holder = path.rpartition(b"/")[0]
            stays = holder in self._directories or holder in self._above_kept
            if stays and path not in self._above_kept:
                yield path

    def _whiteout(self, path: bytes) -> None:
        self._count()
        holder, name = self._place(path)
        made = os.open(name, _NEW, 0o600, dir_fd=holder)
        try:
            os.setxattr(made, WHITEOUT, b"")
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            os.unlink(name, dir_fd=holder)
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=holder)  # anybody may make a whiteout (Linux 5.8)
        finally:
            os.close(made)

    def _count(self) -> None:
        self.changes += 1
        if self.changes > self._most:
            raise UnsupportedError(
                "overlay-too-large", f"the run changed more than {self._most} paths",
                remedy="discard the run, or copy what you need from its disk",
            )  # fmt: skip

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """Return the open directory in which `path` is to be made, and its last part."""
        place, _, name = path.rpartition(b"/")
        if self._holder[0] != place:
            self._make(place)
            opened = beneath.open_directory(self._target, os.fsdecode(place))
            os.close(self._holder[1])
            self._holder = (place, opened)
        return self._holder[1], name

    def _make(self, path: bytes) -> None:
        """Make a directory and those above it, open for their owner."""
        for part in (*_above(path), path):
            if part not in self._made:
                with beneath.parent(self._target, os.fsdecode(part)) as (holder, last):
                    os.mkdir(last, 0o700, dir_fd=holder)
                self._made.add(part)

    def _finish(self, path: bytes) -> None:
        """Set a directory's mode: the guest's, or that of the host's where the guest left it as it was."""
        mode, same = self._directories.get(path, (0o700, True))
        if same and self._root >= 0:
            with contextlib.suppress(OSError), beneath.parent(self._root, os.fsdecode(path)) as (holder, last):
                mode = stat.S_IMODE(os.stat(last, dir_fd=holder, follow_symlinks=False).st_mode)
        with beneath.directory(self._target, os.fsdecode(path)) as opened:
            os.fchmod(opened, mode)


def _same(inode: Inode, was: Was) -> bool:
    """Whether nothing happened to a file: every write of a guest's kernel moves its change time."""
    return inode.generation == 0 and was[:5] == (inode.number, inode.mode, inode.size, inode.mtime_ns, inode.ctime_ns)


def _above(path: bytes) -> Iterator[bytes]:
    """Yield the directories above a path, without the root."""
    at = path.find(b"/")
    while at >= 0:
        yield path[:at]
        at = path.find(b"/", at + 1)
