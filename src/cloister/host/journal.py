"""The file that says which run uses which placeholder: lines of JSON, appended under one lock.

A line holds the records that changed; a record that no run uses is gone. Appending costs a
twentieth of replacing the file (ext4 writes a replaced file out at once, `auto_da_alloc` in
ext4(5)), and the file is empty whenever no run is alive. A last line without its newline was cut
off by a crash before anything it announced was made, so it does not count. What the records mean
is for `placeholders`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from cloister.errors import StepError

COMPACT_BYTES = 1 << 18
"""Beyond this size a line with everything takes the place of all lines."""


class Record(msgspec.Struct):
    """One placeholder. Paths are bytes: a name need not be text."""

    base: bytes
    base_dev: int
    base_ino: int
    name: bytes
    kind: str
    content: bytes
    runs: list[str]
    dev: int = 0
    ino: int = 0
    """0 while it is only intended."""

    @property
    def path(self) -> str:
        """Return the absolute path, for people."""
        return os.fsdecode(self.key)

    @property
    def key(self) -> bytes:
        """Return the absolute path, for comparison."""
        return b"%b/%b" % (self.base, self.name)


class Book:
    """The records, while the lock is held."""

    def __init__(self, descriptor: int, records: dict[bytes, Record]) -> None:
        """Take the open file and what its lines came to."""
        self._descriptor = descriptor
        self._records = records

    def records(self) -> list[Record]:
        """Return all, parents before what lies below them."""
        return list(self._records.values())

    def find(self, path: str) -> Record | None:
        """Return the record of a path."""
        return self._records.get(os.fsencode(path))

    def forget(self, record: Record) -> None:
        """Take a record out whose placeholder is not there any more."""
        record.runs = []
        self.write([record])

    def write(self, changed: list[Record]) -> None:
        """Say what has changed; with no record left the file becomes empty.

        Raises:
            OSError: the file system is full or read-only.
        """
        if not changed:
            return
        _play(self._records, changed)
        if not self._records:
            os.ftruncate(self._descriptor, 0)
            return
        line = memoryview(msgspec.json.encode(changed) + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]


class Shelf:
    """Where the book of one user lies."""

    def __init__(self, state: str) -> None:
        """Keep it in the directory `state`, which must be the user's alone."""
        self._state = state
        self._path = f"{state}/placeholders.jsonl"

    @contextmanager
    def open(self) -> Iterator[Book]:
        """Hold the lock (flock(2)) and give the book.

        Raises:
            StepError: what lies there is no journal.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        os.makedirs(self._state, mode=0o700, exist_ok=True)
        lock = os.open(f"{self._state}/placeholders.lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            descriptor = os.open(self._path, flags, 0o600)
            try:
                records = self._read(descriptor)
                yield Book(descriptor, records)
                if os.fstat(descriptor).st_size > COMPACT_BYTES:
                    self._compact(records)
            finally:
                os.close(descriptor)
        finally:
            os.close(lock)

    def _read(self, descriptor: int) -> dict[bytes, Record]:
        records: dict[bytes, Record] = {}
        size = os.fstat(descriptor).st_size
        text = os.pread(descriptor, size, 0) if size else b""
        whole = text[: text.rfind(b"\n") + 1]
        try:
            for line in whole.splitlines():
                _play(records, msgspec.json.decode(line, type=list[Record]))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            remedy = f"stop all runs, remove the empty files it names from your projects, then: rm {self._path}"
            message = f"the journal of placeholders cannot be read: {error}"
            raise StepError("placeholder-journal", message, where=self._path, remedy=remedy) from error
        if len(whole) < len(text):
            os.ftruncate(descriptor, len(whole))
        return records

    def _compact(self, records: dict[bytes, Record]) -> None:
        fresh = f"{self._path}.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(list(records.values())) + b"\n")
        os.replace(fresh, self._path)


def _play(records: dict[bytes, Record], changed: list[Record]) -> None:
    """Bring records up to date; one that is known keeps its place in the order."""
    for record in changed:
        if record.runs:
            records[record.key] = record
        else:
            records.pop(record.key, None)
