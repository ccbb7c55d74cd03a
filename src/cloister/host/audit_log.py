"""The one writer of an audit log's files: append, rotate, compress, remove what is old, and begin again after a crash.

What is promised, and by whom:

- **The keeper dies** (`kill -9`) at any instant: every `write` that returned is in the file, since its bytes are the
  kernel's. Half a line is cut off by the next `open`, kept aside in a file of its own, and reported.
- **The machine dies**: what `sync` covered is there. Keepers sync at each head, so signed lines are never lost.
- **The disk is full**, or read-only: `write` raises and nothing of it stays; the same bytes may be written later.
- **Two keepers**: the second gets no lock.

Lines come from elsewhere and are not looked at (`audit/chain.py`, `runs/audit_keeper.py`). One thread at a time, but
for `compress`, which may run beside everything else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import NamedTuple

import msgspec

from cloister.errors import RetryError, StepError
from cloister.host.audit_files import HEAD, MAX_LINE, Head, Segment, read_lines, segment_name, segments
from cloister.host.audit_pack import pack

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Tail(NamedTuple):
    """Where a log ends that was there before."""

    opening: bytes
    """The first line of the last segment, which names the log; empty for a new log."""
    last: bytes
    """The last whole line."""
    torn: int
    """Bytes of half a line, which were put aside."""


class Log:
    """A directory of segments, and the lock on it."""

    def __init__(self, directory: str, *, mode: int = 0o600) -> None:
        """Touch nothing yet; `mode` is that of segments, 0640 where a group may read."""
        self.directory = directory
        self._mode = mode
        self._lock = self._descriptor = -1
        self._path = ""
        self._unlisted = False
        self._half = False
        self.size = 0
        """Bytes of the open segment."""

    @property
    def is_open(self) -> bool:
        """Whether a segment is open for writing."""
        return self._descriptor >= 0

    @property
    def first(self) -> int:
        """The number of the open segment's first line."""
        return int(os.path.basename(self._path).partition(".")[0])

    @property
    def descriptor(self) -> int:
        """The open segment, for a writer in C; it appends."""
        return self._descriptor

    def open(self) -> Tail:
        """Take the lock, cut off half a line, and go on with the last segment where it is not compressed.

        Raises:
            RetryError: another keeper writes here.
            StepError: others than we could change the directory.
            OSError: the directory cannot be made, read or written.
        """
        os.makedirs(self.directory, mode=0o700 if self._mode & 0o077 == 0 else 0o750, exist_ok=True)
        info = os.lstat(self.directory)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            remedy = f"chmod go-w {self.directory}"
            raise StepError("audit-unsafe", "others could change the audit log", where=self.directory, remedy=remedy)
        self._take_lock()
        for name in os.listdir(self.directory):
            if name.endswith(".new"):
                os.unlink(f"{self.directory}/{name}")
        found = segments(self.directory)
        self._forget_doubles(found)
        while found and not found[-1].compressed and os.path.getsize(found[-1].path) == 0:
            os.unlink(found.pop().path)  # killed before its first line
        if not found:
            return Tail(b"", b"", 0)
        return self._resume(found)

    def write(self, data: bytes | memoryview) -> None:
        """Add whole lines at the end in a single system call: all of them or none.

        Raises:
            OSError: nothing was written.
        """
        if self._half:  # what an earlier write left must go first
            os.ftruncate(self._descriptor, self.size)
            self._half = False
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            self._cut()
            raise
        if written != len(data):
            self._cut()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        self.size += written

    def begin(self, first: int) -> None:
        """Begin a segment whose first line has this number; the one before is synced and closed.

        Raises:
            OSError: it cannot be made; the one before stays open.
        """
        path = f"{self.directory}/{segment_name(first)}"
        descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, self._mode)
        os.fchmod(descriptor, self._mode)
        if self._descriptor >= 0:
            try:
                os.fdatasync(self._descriptor)
            except OSError:
                os.close(descriptor)
                os.unlink(path)
                raise
            os.close(self._descriptor)
        self._descriptor, self._path, self.size, self._unlisted = descriptor, path, 0, True

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            OSError: they may not be.
        """
        os.fdatasync(self._descriptor)
        if self._unlisted:
            self._sync_directory()
            self._unlisted = False

    def latest(self, size: int) -> list[bytes]:
        """Return whole lines from the end of the last two segments that are not compressed, so many bytes of each."""
        lines: list[bytes] = []
        for segment in segments(self.directory)[-2:]:
            if not segment.compressed:
                with contextlib.suppress(OSError), open(segment.path, "rb") as file:
                    start = max(0, os.fstat(file.fileno()).st_size - size)
                    file.seek(start)
                    lines += file.read(size).splitlines()[1 if start else 0 :]
        return lines

    def note(self, head: Head) -> None:
        """Replace `HEAD`; its lines must have been synced before."""
        self.replace(HEAD, msgspec.json.encode(head) + b"\n")

    def replace(self, name: str, data: bytes) -> None:
        """Put a small file beside the segments, whole or not at all.

        Raises:
            OSError: the old one is still there.
        """
        fresh = f"{self.directory}/{name}.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, self._mode)
        try:
            os.fchmod(descriptor, self._mode)
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fresh)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(fresh, f"{self.directory}/{name}")

    def closed_segments(self) -> list[Segment]:
        """Return all but the open one, oldest first. For the thread that writes: `begin` must not come in between."""
        return [one for one in segments(self.directory) if one.path != self._path]

    def compress(self, segment: Segment) -> None:
        """Compress a closed segment and let the result take its place. May run in another thread.

        Raises:
            OSError: it stays as it was.
        """
        if segment.compressed:
            return
        fresh, final = f"{segment.path}.gz.new", f"{segment.path}.gz"
        try:
            with open(segment.path, "rb") as source, open(fresh, "wb") as raw:
                os.fchmod(raw.fileno(), self._mode)
                raw.writelines(pack(source))  # members of their own, so that readers get at any place quickly
                raw.flush()
                os.fsync(raw.fileno())
                written = os.fstat(source.fileno()).st_mtime_ns
            os.utime(fresh, ns=(written, written))
            os.rename(fresh, final)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        self._sync_directory()
        try:
            os.unlink(segment.path)
        except FileNotFoundError:  # removed meanwhile, as too old: then this must not come back
            with contextlib.suppress(FileNotFoundError):
                os.unlink(final)

    def older_than(self, time_s: float) -> list[Segment]:
        """Return closed segments whose last line was written before this time (seconds since the epoch), in order."""
        old: list[Segment] = []
        for segment in self.closed_segments():
            try:
                if os.stat(segment.path).st_mtime >= time_s:
                    break  # what follows is younger, whatever its time says
            except FileNotFoundError:
                continue  # compressed meanwhile
            old.append(segment)
        return old

    @staticmethod
    def remove(old: list[Segment]) -> None:
        """Delete segments, oldest first, in whichever form they are."""
        for segment in old:
            for path in (segment.path, segment.path.removesuffix(".gz"), f"{segment.path.removesuffix('.gz')}.gz"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def close(self) -> None:
        """Let go of segment and lock. May be called twice."""
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1

    # --- beginning again ------------------------------------------------------------------

    def _take_lock(self) -> None:
        path = f"{self.directory}/lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            message = "another process keeps this audit log, and there can be only one"
            raise RetryError("audit-in-use", message, where=self.directory) from None

    def _forget_doubles(self, found: list[Segment]) -> None:
        """Remove the originals of segments whose compressed form is whole: the keeper was killed in between."""
        for segment in found:
            if segment.compressed:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(segment.path.removesuffix(".gz"))

    def _resume(self, found: list[Segment]) -> Tail:
        last = found[-1]
        if last.compressed:
            lines = [line for portion, _ in read_lines(last) for line in portion]
            return Tail(lines[0], lines[-1], 0) if lines else Tail(b"", b"", 0)
        self._descriptor, self._path = os.open(last.path, _FLAGS), last.path
        size = os.fstat(self._descriptor).st_size
        opening = os.pread(self._descriptor, MAX_LINE, 0).partition(b"\n")[0]
        start = max(0, size - 2 * MAX_LINE)
        end = os.pread(self._descriptor, size - start, start)
        whole, newline, torn = end.rpartition(b"\n")
        if torn:
            self._put_aside(last.first, torn)
            os.ftruncate(self._descriptor, size - len(torn))
        self.size = size - len(torn)
        if not newline:  # not even its first line is whole: the segment before ends the log
            self.close_segment()
            os.unlink(last.path)
            rest = self._resume(found[:-1]) if found[:-1] else Tail(b"", b"", 0)
            return rest._replace(torn=len(torn) + rest.torn)
        return Tail(opening, whole.rpartition(b"\n")[2], len(torn))

    def close_segment(self) -> None:
        """Close the open segment; `begin` opens the next."""
        os.close(self._descriptor)
        self._descriptor, self._path, self.size = -1, "", 0

    def _put_aside(self, first: int, torn: bytes) -> None:
        for number in range(1000):
            path = f"{self.directory}/torn-{first:016d}-{number}.bin"
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
            except FileExistsError:
                continue
            with os.fdopen(descriptor, "wb") as file:
                file.write(torn)
            return

    def _cut(self) -> None:
        """Take half a write off the end; where that fails as well, the next `write` does it first."""
        self._half = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self.size)
            self._half = False

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
