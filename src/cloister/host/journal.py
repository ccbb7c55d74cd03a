"""An append-only journal of small records in one directory: one write(2) per record or more, read again after a crash.

What is promised, and by whom:

- **The process dies** (`kill -9`, out of memory, a bug) at any instant: every `append` that returned is read again,
  since its bytes are the kernel's. A record that was half written is not believed and not returned.
- **The machine dies** (power, kernel): records that `sync` covered are there (fdatasync(2)); younger ones may be lost.
  A caller that syncs once a second loses a second at most.
- **The disk is full**: `append` raises, and nothing of the record stays; the next one may succeed.
- **Bytes rot**: a record whose checksum is wrong is skipped and counted; those after it are found again.

A record is `u32 length of payload, u32 CRC-32 of kind and payload, u8 kind, payload`, little endian. Records stand in
segments, numbered files; a segment is deleted when nobody needs its records any more, which their `pins` count. What
records mean is not known here: see `runs/books.py`. Appending and pins belong to one thread at a time; `sync` may run
in another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import zlib
from typing import NamedTuple

from cloister.errors import RetryError

SEGMENT_BYTES = 4 << 20
"""A new segment is begun beyond this."""
MAX_PAYLOAD = 1 << 16
"""No record is longer; a length beyond it is damage."""

_HEAD = struct.Struct("<IIB")
_NAME = re.compile(r"journal-(\d{10})\.log")
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Record(NamedTuple):
    """One record as it was appended."""

    kind: int
    payload: bytes


class Reading(NamedTuple):
    """What a segment holds: its records in order, and how many bytes of it are not records."""

    records: list[Record]
    damaged: int


class Segment:
    """One file of the journal, and how many records in it are still needed."""

    __slots__ = ("number", "path", "pins", "size")

    def __init__(self, path: str, number: int, size: int) -> None:
        """Describe a file that is there."""
        self.path = path
        self.number = number
        self.size = size
        self.pins = 0


def frame(kind: int, payload: bytes) -> bytes:
    """Return a record as it stands in the file."""
    return _HEAD.pack(len(payload), zlib.crc32(payload, kind), kind) + payload


def parse(data: bytes) -> Reading:
    """Return the whole records of a segment; whatever is torn or damaged is passed over and counted."""
    records: list[Record] = []
    damaged = place = 0
    while place + _HEAD.size <= len(data):
        length, checksum, kind = _HEAD.unpack_from(data, place)
        start = place + _HEAD.size
        if length <= MAX_PAYLOAD and start + length <= len(data):
            payload = data[start : start + length]
            if zlib.crc32(payload, kind) == checksum and (length or kind):
                records.append(Record(kind, payload))
                place = start + length
                continue
        place += 1
        damaged += 1
    return Reading(records, damaged + len(data) - place)


def segments(directory: str) -> list[tuple[int, str]]:
    """Return number and path of each segment, in the order in which they were written."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted((int(found[1]), f"{directory}/{name}") for name in names if (found := _NAME.fullmatch(name)))


def read(directory: str) -> Reading:
    """Return what all segments hold, without a lock; for those who only look."""
    records: list[Record] = []
    damaged = 0
    for _, path in segments(directory):
        try:
            reading = parse(_content(path))
        except FileNotFoundError:
            continue  # deleted meanwhile: its records are in the database
        records += reading.records
        damaged += reading.damaged
    return Reading(records, damaged)


class Journal:
    """The one writer of a directory's journal."""

    def __init__(self, directory: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Take the lock; `replay` must be called before the first `append`.

        Raises:
            RetryError: another process writes here.
            OSError: the directory cannot be made or written.
        """
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._lock = os.open(f"{directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise RetryError(
                "ledger-in-use",
                "another process keeps these books, and there can be only one",
                where=f"{directory}{_holder(f'{directory}/lock')}",
                remedy="let that process serve the models, or end it; cloister usage reads meanwhile",
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, b"%d\n" % os.getpid())
        self._old: list[Segment] = []
        self._active: Segment | None = None
        self._descriptor = -1
        self._left: list[int] = []
        self._next = max((number for number, _ in segments(directory)), default=0) + 1
        self._dirty = self._unlisted = False

    def replay(self) -> list[tuple[Segment, Reading]]:
        """Return what the segments hold, the oldest first; each stays until it has no pins and `sweep` is called."""
        found = []
        for number, path in segments(self._directory):
            content = _content(path)
            segment = Segment(path, number, len(content))
            self._old.append(segment)
            found.append((segment, parse(content)))
        return found

    def append(self, kind: int, payload: bytes) -> Segment:
        """Write a record, and return the segment that holds it.

        Raises:
            OSError: it was not written, and nothing of it stays.
        """
        if len(payload) > MAX_PAYLOAD:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return self.append_frames(frame(kind, payload))

    def append_frames(self, data: bytes) -> Segment:
        """Write records that `frame` made, one behind the other, in one write(2); all of them or none.

        Raises:
            OSError: none was written, and nothing of them stays.
        """
        active = self._active
        if active is None or active.size >= self._segment_bytes:
            active = self._begin()
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            self._cut(active)
            raise
        if written != len(data):
            self._cut(active)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), active.path)
        active.size += written
        self._dirty = True
        return active

    def sync(self) -> None:
        """Wait until what was appended is on the disk; errors are for the next append to find."""
        if not self._dirty:
            return
        self._dirty = False
        left, self._left = self._left, []
        for descriptor in left:
            with contextlib.suppress(OSError):
                os.fdatasync(descriptor)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.fdatasync(self._descriptor)
            if self._unlisted:
                self._unlisted = False
                _sync_directory(self._directory)

    def sweep(self) -> list[Segment]:
        """Take the segments that nobody needs off the list, and return them, to be deleted by `delete`."""
        done = [segment for segment in self._old if segment.pins <= 0]
        self._old = [segment for segment in self._old if segment.pins > 0]
        active = self._active
        if active is not None and active.pins <= 0 and active.size >= self._segment_bytes // 4:
            os.ftruncate(self._descriptor, 0)  # nothing in it is needed: the same file serves again
            active.size = 0
        return done

    @staticmethod
    def delete(done: list[Segment]) -> None:
        """Delete swept segments. One that stays by an error is replayed again, which changes nothing."""
        for segment in done:
            with contextlib.suppress(OSError):
                os.unlink(segment.path)

    def size(self) -> int:
        """Return the bytes of all segments."""
        return sum(segment.size for segment in self._old) + (self._active.size if self._active else 0)

    def close(self) -> None:
        """Sync, delete what is not needed, and let go of the lock. May be called twice."""
        if self._lock < 0:
            return
        self._dirty = self._active is not None
        self.sync()
        if self._active is not None:
            self._old.append(self._active)
            os.close(self._descriptor)
            self._active, self._descriptor = None, -1
        self.delete(self.sweep())
        os.close(self._lock)
        self._lock = -1

    def _begin(self) -> Segment:
        """Start the next segment; the last one stays as long as it is needed."""
        path = f"{self._directory}/journal-{self._next:010d}.log"
        descriptor = os.open(path, _FLAGS | os.O_EXCL, 0o600)
        if self._active is not None:
            self._left.append(self._descriptor)  # synced and closed by `sync`, which may take its time
            self._old.append(self._active)
        self._descriptor = descriptor
        self._active = Segment(path, self._next, 0)
        self._next += 1
        self._unlisted = True
        return self._active

    def _cut(self, active: Segment) -> None:
        """Take half a record off the end; where even that fails, write no more to this segment."""
        try:
            os.ftruncate(self._descriptor, active.size)
        except OSError:
            active.size = self._segment_bytes


def _holder(path: str) -> str:
    """Return who has a lock, as the end of a place; nothing where that cannot be known."""
    try:
        with open(path, "rb") as file:
            pid = int(file.read(32))
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).split(b"\0")
    except (OSError, ValueError):
        return ""
    names = {b"cloister.services.broker": "the broker", b"cloister.services.inference": "the inference service"}
    known = next((name for word, name in names.items() if word in words), "another program")
    return f", by {known}, process {pid}"


def _content(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _sync_directory(path: str) -> None:
    """Make the names of new segments as lasting as their content (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
