"""An index over the segments of an audit log: which events of which chunk hold which word. A cache of its reader's.

Built by whoever reads, as far as the log has grown since; never trusted: events are always read from the segments and
looked at again, and `cloister audit verify` does not know it. What it costs when it is wrong is a rebuild.

A *chunk* is at most 65,536 events of one segment, written once in one transaction (a reader that is killed loses one
chunk of work) and removed with its segment. Its rows are keyed by chunk first, so that building only ever appends.
SQLite by apsw, as for the ledger; WAL, so that several read while one builds.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import apsw

from cloister.host import audit_postings as postings
from cloister.host.audit_files import Segment, segments
from cloister.host.audit_segments import Opened
from cloister.host.audit_words import WORDS, hash_of, words_of

VERSION = 1
TAIL = 8192
"""Fewest events of a growing segment that become a chunk; fewer are read from the file with each question."""
BUSY_MS = 60_000
_END = 80
"""Bytes at the end of a line that hold its hash."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS segments (
  first INTEGER PRIMARY KEY, indexed INTEGER NOT NULL, tail TEXT NOT NULL,
  inode INTEGER NOT NULL, size INTEGER NOT NULL, changed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (
  chunk INTEGER PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL, events INTEGER NOT NULL,
  since INTEGER NOT NULL, until INTEGER NOT NULL, ends BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS chunks_of_segment ON chunks (segment);
CREATE TABLE IF NOT EXISTS postings (
  chunk INTEGER NOT NULL, word INTEGER NOT NULL, value TEXT NOT NULL, events INTEGER NOT NULL, places BLOB NOT NULL,
  PRIMARY KEY (chunk, word, value)) WITHOUT ROWID;
"""


class Chunk(NamedTuple):
    """Some events of one segment, one after the other."""

    chunk: int
    segment: int
    start: int
    """Offset of the first in the plain text."""
    events: int
    since: int
    """Earliest time, in nanoseconds since the epoch."""
    until: int
    """Latest time."""


class Wanted(NamedTuple):
    """One condition: a word has one of these values, or a value of one of these patterns."""

    values: tuple[tuple[str, str], ...] = ()
    """Words with the value that they may have."""
    patterns: tuple[tuple[str, str], ...] = ()
    """Words with a pattern as of glob(7), where `*` stands for `/` too."""


class Progress(NamedTuple):
    """How far building has come."""

    part: float
    """From 0 to 1, by segments that have something new."""
    events: int
    """Events taken in so far."""


class AuditIndex:
    """One connection to the index of one log."""

    def __init__(self, path: str, log: str, severities: Mapping[str, int]) -> None:
        """Open the index of the log in the directory `log`; make it where there is none, or where it is broken.

        Args:
            path: the file of the index.
            log: the directory with the segments.
            severities: how severe each kind of event is at least.

        Raises:
            OSError: the file or its directory cannot be made.
        """
        self.path, self.log, self._severities = path, log, severities
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            self._db = _open(path)
        except (apsw.CorruptError, apsw.NotADBError):
            self.discard()
            self._db = _open(path)
        except apsw.CantOpenError as error:
            raise PermissionError(13, "cannot be opened", path) from error

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def discard(self) -> None:
        """Remove the files of an index that cannot be used."""
        for end in ("", "-wal", "-shm"):
            if os.path.lexists(self.path + end):
                os.unlink(self.path + end)

    def refresh(self, told: Callable[[Progress], None] | None = None) -> None:
        """Take in what the log has gained and lost since the last time.

        Args:
            told: hears of progress after each chunk.

        Raises:
            OSError: the log cannot be read.
        """
        with self._alone():
            there = segments(self.log)
            self._forget(there)
            known = {row[0]: row[1:] for row in self._rows("SELECT first, inode, size, changed FROM segments")}
            work = []
            for segment in there:
                with _gone_is_gone():
                    status = os.stat(segment.path)
                    if (status.st_ino, status.st_size, status.st_mtime_ns) != known.get(segment.first):
                        work.append((segment, segment is not there[-1]))
            builder = _Builder(self._db, self._severities, told)
            for number, (segment, closed) in enumerate(work):
                builder.place = (number, len(work))
                with _gone_is_gone(), Opened(segment) as opened:
                    builder.take(opened, closed=closed)

    def chunks(self, since: int, until: int, *, newest_first: bool) -> list[Chunk]:
        """Return the chunks that may hold events of a span of time."""
        sql = (
            "SELECT chunk, segment, start, events, since, until FROM chunks WHERE until >= ? AND since <= ? "
            "ORDER BY segment, start"
        )
        found = [Chunk(*row) for row in self._rows(sql, (since, until))]
        return found[::-1] if newest_first else found

    def places(self, chunk: Chunk, wanted: tuple[Wanted, ...]) -> int:
        """Return which events of a chunk fulfil all conditions, as the bits of a number."""
        found = (1 << chunk.events) - 1
        for condition in wanted:
            if not found:
                break
            found &= self._places_of(chunk, condition)
        return found

    def ends(self, chunk: Chunk) -> array[int]:
        """Return the offsets, from the chunk's start, at which its lines end."""
        found = array("I")
        for (blob,) in self._rows("SELECT ends FROM chunks WHERE chunk = ?", (chunk.chunk,)):
            found.frombytes(blob)
        return found

    def sums(self, chunk: Chunk, word: str) -> list[tuple[str, int]]:
        """Return all values of a word in a chunk, with how many events have them."""
        sql = "SELECT value, events FROM postings WHERE chunk = ? AND word = ?"
        return [(value, events) for value, events in self._rows(sql, (chunk.chunk, WORDS.index(word)))]

    def sets(self, chunk: Chunk, word: str) -> Iterator[tuple[str, int]]:
        """Yield all values of a word in a chunk, with the events that have them as bits."""
        sql = "SELECT value, places FROM postings WHERE chunk = ? AND word = ?"
        for value, places in self._rows(sql, (chunk.chunk, WORDS.index(word))):
            yield value, postings.bits(places, chunk.events)

    def indexed(self) -> dict[int, int]:
        """Return up to which offset each segment is indexed, by its first sequence number."""
        return dict(self._rows("SELECT first, indexed FROM segments"))

    def drop(self, segment: int) -> None:
        """Forget a segment whose file is not what was indexed; the next `refresh` reads it again."""
        with self._db:
            _forget(self._db, segment)

    def _places_of(self, chunk: Chunk, wanted: Wanted) -> int:
        found = 0
        for word, value in wanted.values:
            sql = "SELECT places FROM postings WHERE chunk = ? AND word = ? AND value = ?"
            for (places,) in self._rows(sql, (chunk.chunk, WORDS.index(word), value)):
                found |= postings.bits(places, chunk.events)
        for word, pattern in wanted.patterns:
            first, last = _span(pattern)
            sql = (
                "SELECT places FROM postings WHERE chunk = ? AND word = ? AND value >= ? AND value < ? AND value GLOB ?"
            )
            values = (chunk.chunk, WORDS.index(word), first, last, pattern.replace("[!", "[^"))
            for (places,) in self._rows(sql, values):
                found |= postings.bits(places, chunk.events)
        return found

    def _rows(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        return self._db.execute(sql, values)

    def _forget(self, there: list[Segment]) -> None:
        """Remove what is known of segments that are gone, and of those that are not what they were."""
        files = {segment.first: segment for segment in there}
        for first, indexed, tail, *sign in list(self._rows("SELECT * FROM segments")):
            segment = files.get(first)
            if segment is None or not _same(segment, indexed, tail, sign):
                with self._db:
                    _forget(self._db, first)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one reader build at a time; the others wait, and then find its work done."""
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class _Builder:
    """Reads segments and writes chunks."""

    def __init__(
        self, db: apsw.Connection, severities: Mapping[str, int], told: Callable[[Progress], None] | None
    ) -> None:
        self._db = db
        self._severities = severities
        self._told = told
        self._events = 0
        self.place = (0, 1)
        """Which segment of how many is at work."""

    def take(self, opened: Opened, *, closed: bool) -> None:
        """Index what a segment has gained; all of it where it is closed, else what fills a chunk."""
        first = opened.segment.first
        sign, end = opened.sign(), opened.size
        rows: list[Any] = self._db.execute("SELECT indexed FROM segments WHERE first = ?", (first,)).fetchall()
        at: int = rows[0][0] if rows else 0
        if not rows:
            self._db.execute("INSERT INTO segments VALUES (?, 0, '', 0, 0, 0)", (first,))
        lines: list[bytes] = []
        start = at
        for _, block in opened.blocks(at, end):
            lines += block.splitlines(keepends=True)
            while len(lines) >= postings.CHUNK:
                start = self._write(first, start, lines[: postings.CHUNK], end)
                del lines[: postings.CHUNK]
        if lines and (closed or len(lines) >= TAIL):
            start = self._write(first, start, lines, end)
        if closed:
            self._db.execute("UPDATE segments SET inode = ?, size = ?, changed = ? WHERE first = ?", (*sign, first))

    def _write(self, segment: int, start: int, lines: list[bytes], total: int) -> int:
        """Write one chunk; return where the next one starts."""
        found = words_of(lines, self._severities)
        ends, at = array("I"), 0
        for line in lines:
            at += len(line)
            ends.append(at)
        with self._db:
            self._db.execute(
                "INSERT INTO chunks (segment, start, events, since, until, ends) VALUES (?, ?, ?, ?, ?, ?)",
                (segment, start, len(lines), found.since, found.until, ends.tobytes()),
            )
            chunk = self._db.last_insert_rowid()
            size = len(lines)
            for word, values in enumerate(found.values):
                self._db.executemany(
                    "INSERT INTO postings VALUES (?, ?, ?, ?, ?)",
                    (
                        (chunk, word, value, len(values[value]), postings.encode(values[value], size))
                        for value in sorted(values)
                    ),
                )
            self._db.execute(
                "UPDATE segments SET indexed = ?, tail = ? WHERE first = ?", (start + at, hash_of(lines[-1]), segment)
            )
        self._events += len(lines)
        if self._told:
            number, count = self.place
            self._told(Progress((number + (start + at) / total) / count, self._events))
        return start + at


def _open(path: str) -> apsw.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    db = apsw.Connection(path)
    db.set_busy_timeout(BUSY_MS)
    for pragma in ("page_size = 16384", "journal_mode = WAL", "synchronous = NORMAL", "cache_size = -65536"):
        db.execute(f"PRAGMA {pragma}")
    (version,) = db.execute("PRAGMA user_version").fetchall()[0]
    if version not in (0, VERSION):
        for table in ("segments", "chunks", "postings"):
            db.execute(f"DROP TABLE IF EXISTS {table}")
    db.execute(_SCHEMA)
    db.execute(f"PRAGMA user_version = {VERSION}")
    return db


def _forget(db: apsw.Connection, segment: int) -> None:
    db.execute("DELETE FROM postings WHERE chunk IN (SELECT chunk FROM chunks WHERE segment = ?)", (segment,))
    db.execute("DELETE FROM chunks WHERE segment = ?", (segment,))
    db.execute("DELETE FROM segments WHERE first = ?", (segment,))


def _same(segment: Segment, indexed: int, tail: str, sign: list[int]) -> bool:
    """Tell whether a file is what was indexed, grown or packed: the last line of then is where it was, by its hash.

    The hash of a line covers all lines before it.
    """
    try:
        status = os.stat(segment.path)
        if [status.st_ino, status.st_size, status.st_mtime_ns] == sign or not indexed:
            return True
        with Opened(segment) as opened:
            return opened.size >= indexed and hash_of(opened.read(max(0, indexed - _END), _END)) == tail
    except (OSError, ValueError):
        return False


def _span(pattern: str) -> tuple[str, str]:
    """Return the range of values that a pattern can match: from its literal beginning to what follows it."""
    literal = pattern
    for sign in "*?[":
        literal = literal.split(sign, 1)[0]
    if not literal:
        return "", "\U0010ffff"
    return literal, literal[:-1] + chr(min(ord(literal[-1]) + 1, 0x10FFFF))


@contextmanager
def _gone_is_gone() -> Iterator[None]:
    """Let a segment that was packed or removed meanwhile be: the next look finds it under its new name, or not."""
    try:
        yield
    except FileNotFoundError:
        return
