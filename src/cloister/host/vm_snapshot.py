"""Snapshots of a machine: copied while it stands still, hashed when it goes on, verified while they are used.

    snapshots/NAME/record.json       what it is and the digests of the others; 0400, as they are
    snapshots/NAME/FILE              a copy of each disk, sparse
    snapshots/NAME/memory            the state of the machine, where that was kept; Firecracker's is two files
    snapshots/NAME/state             processors and devices of one of Firecracker's
    snapshots/.making-NAME/          one that is being made; locked by who makes it, else a leftover
    snapshots/fork-…/                one that only `vm fork` needs; locked by it, else a leftover

No copy shares its bytes with a disk that is written, but where the file system copies them on a change (FICLONE).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import msgspec

from cloister.errors import RetryError, StepError, UsageError
from cloister.host import private_files, removal, vm_memory
from cloister.host.sparse import copy_data
from cloister.plan.vm_snapshot import MEMORY, NAME, RECORD, STATE, Disk, Snapshot

M = TypeVar("M")
Written = Callable[[], tuple[str, ...]]
"""Called when the machine goes on; returns the names of what was written of its memory."""
MAKING = ".making-"
_THROWAWAY = re.compile(r"fork-[0-9a-f]{16}")
_YOUNG_S = 60.0
"""A throwaway snapshot that is younger may not have been locked yet."""
_MAX_RECORD = 1 << 20
_FICLONE = 0x40049409  # linux/fs.h
_NAME = re.compile(NAME)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_name(name: str) -> None:
    """Accept what may name a snapshot.

    Raises:
        UsageError: anything else.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "snapshot-name", f"{name!r} cannot name a snapshot", remedy="lower-case letters, digits, . _ -, 63 at most"
        )


def throwaway_name() -> str:
    """Return a new name for a snapshot that is removed as soon as others were started from it."""
    return f"fork-{secrets.token_hex(8)}"


def is_throwaway(name: str) -> bool:
    """Tell whether a name is one of those."""
    return bool(_THROWAWAY.fullmatch(name))


@contextlib.contextmanager
def throwaway(root: str, name: str) -> Iterator[None]:
    """Keep a throwaway snapshot from being tidied up, and remove it in the end.

    Raises:
        OSError: there is none.
    """
    descriptor = os.open(f"{root}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
        remove(root, name)


def take(  # noqa: PLR0913  # what is kept, and how
    root: str, name: str, files: Mapping[str, str | int], describe: Callable[[tuple[Disk, ...], float], Snapshot],
    held: Callable[[], contextlib.AbstractContextManager[M]], memory: Callable[[M, str], Written] | None = None,
) -> Snapshot:  # fmt: skip
    """Copy disks, and have the memory written, while the machine is held still.

    Args:
        root: the directory of snapshots; made where it is missing.
        name: its name.
        files: the disks' paths, or descriptors of what has no name, by the name of the copy.
        describe: makes the record, from the copies' digests and how long the machine stood still.
        held: a context in which the machine stands still, and what can be asked for its memory.
        memory: has that written, for a directory; what it returns is called when the machine goes on, and returns the
            names of new files there. None keeps the disks only.

    Raises:
        UsageError: there is one of this name.
        RetryError: one of this name is being made.
        StepError: there is no room, or a disk cannot be read.
    """
    check_name(name)
    if os.path.lexists(f"{root}/{name}"):
        raise UsageError("snapshot-exists", f"there is a snapshot {name}", remedy=f"cloister vm rm {name}")
    os.makedirs(root, mode=0o700, exist_ok=True)
    directory = f"{root}/{MAKING}{name}"
    with _lock(directory):
        try:
            with held() as machine:
                began = time.monotonic()
                written = memory(machine, directory) if memory else _nothing
                for copy, path in files.items():
                    _copy(path, f"{directory}/{copy}")
                paused = time.monotonic() - began
            disks = tuple(_hashed(directory, copy) for copy in (*files, *written()))
            record = describe(disks, round(paused, 4))
            _write(f"{directory}/{RECORD}", msgspec.json.encode(record, order="sorted"))
            os.rename(directory, f"{root}/{name}")
        except OSError as error:
            raise StepError(
                "snapshot-failed", f"the snapshot cannot be made: {error.strerror or error}", where=f"{root}/{name}"
            ) from None
        finally:
            removal.sweep(directory)
    return record


def _nothing() -> tuple[str, ...]:
    return ()


def read(root: str, name: str) -> Snapshot:
    """Return the record of a snapshot.

    Raises:
        UsageError: there is none of this name, or it is none.
    """
    check_name(name)
    data = private_files.read(f"{root}/{name}/{RECORD}", _MAX_RECORD)
    try:
        record = msgspec.json.decode(data or b"", type=Snapshot)
    except msgspec.DecodeError:
        raise UsageError("snapshot-unknown", f"there is no snapshot {name}", remedy="cloister vm snapshots") from None
    if record.name != name:
        raise UsageError("snapshot-unknown", f"the snapshot {name} was renamed", remedy=f"cloister vm rm {name}")
    return record


def every(root: str) -> Iterator[Snapshot]:
    """Yield the records of all snapshots."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(root)):
            with contextlib.suppress(UsageError):
                yield read(root, name)


def restore(root: str, record: Snapshot, targets: Mapping[str, str]) -> None:
    """Copy the disks of a snapshot to new files; each is verified while it is copied.

    Raises:
        StepError: `snapshot-changed`: a disk is not what it was; no target is left.
    """
    written: list[str] = []
    try:
        for disk in record.disks:
            if disk.name in {MEMORY, STATE}:
                continue
            target = targets[disk.name]
            written.append(target)
            _verified(f"{root}/{record.name}/{disk.name}", target, disk)
    except (OSError, KeyError) as error:
        for path in written:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise _changed(
            root, record, error.strerror if isinstance(error, OSError) else f"no place for {error}"
        ) from None


def state(root: str, record: Snapshot, name: str = MEMORY) -> int:
    """Return a sealed copy of a file with the state of a snapshot's machine, at its beginning; the caller closes it.

    Raises:
        StepError: `snapshot-changed`: it is not what it was.
    """
    try:
        kept = next(file for file in record.disks if file.name == name)
        copied = vm_memory.sealed(f"{root}/{record.name}/{name}", kept.digest, kept.size)
    except (OSError, StopIteration) as error:
        raise _changed(root, record, error.strerror if isinstance(error, OSError) else f"it has no {name}") from None
    os.lseek(copied, 0, os.SEEK_SET)
    return copied


def _changed(root: str, record: Snapshot, why: str | None) -> StepError:
    return StepError(
        "snapshot-changed", f"the snapshot {record.name} cannot be used: {why}", where=f"{root}/{record.name}",
        remedy=f"cloister vm rm {record.name}",
    )  # fmt: skip


def remove(root: str, name: str) -> None:
    """Remove a snapshot, its record first.

    Raises:
        UsageError: there is none.
    """
    check_name(name)
    if not os.path.isdir(f"{root}/{name}"):
        raise UsageError("snapshot-unknown", f"there is no snapshot {name}", remedy="cloister vm snapshots")
    with contextlib.suppress(OSError):
        os.unlink(f"{root}/{name}/{RECORD}")
    removal.sweep(f"{root}/{name}")


def tidy(root: str) -> None:
    """Remove what makers and forks that died have left."""
    with contextlib.suppress(OSError):
        for name in os.listdir(root):
            if name.startswith(MAKING):
                with contextlib.suppress(RetryError), _lock(f"{root}/{name}"):
                    removal.sweep(f"{root}/{name}")
            elif is_throwaway(name) and _is_stale(f"{root}/{name}"):
                remove(root, name)


def _is_stale(directory: str) -> bool:
    """Tell whether nobody holds a throwaway snapshot, and nobody is about to."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return time.time() - os.fstat(descriptor).st_mtime > _YOUNG_S
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(directory: str) -> Iterator[None]:
    """Make the directory of one that is being made, empty, and hold it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RetryError("snapshot-busy", "this snapshot is being made", where=directory, remedy="wait") from None
        for name in os.listdir(descriptor):
            os.unlink(name, dir_fd=descriptor)
        yield
    finally:
        os.close(descriptor)


def _copy(path: str | int, target: str) -> None:
    """Copy a file as fast as the file system can: its machine stands still meanwhile."""
    if isinstance(path, int):  # anew: its monitor has the other's offset
        source = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)
    else:
        source = os.open(path, _READ)
    try:
        copy = os.open(target, _NEW, 0o600)
        try:
            try:
                fcntl.ioctl(copy, _FICLONE, source)
            except OSError:
                if not copy_data(source, copy, os.fstat(source).st_size):
                    raise OSError(errno.EIO, "a disk became shorter") from None
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _hashed(directory: str, name: str) -> Disk:
    path = f"{directory}/{name}"
    descriptor = os.open(path, _READ)
    try:
        size = os.fstat(descriptor).st_size
        digest = vm_memory.digest(descriptor, size)
        os.fsync(descriptor)
        os.fchmod(descriptor, 0o400)
    finally:
        os.close(descriptor)
    return Disk(name=name, size=size, digest=digest)


def _verified(path: str, target: str, disk: Disk) -> None:
    source = os.open(path, _READ)
    try:
        copy = os.open(target, _NEW, 0o600)
        try:
            os.ftruncate(copy, disk.size)
            found, _ = vm_memory.copy(source, copy, disk.size)
            if found != disk.digest:
                raise OSError(0, "a disk has another content")
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, _NEW, 0o400)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
