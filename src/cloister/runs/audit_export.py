"""The export of an audit log to one receiver: follows the log, sends, remembers how far it got.

At least once: what is not known to have arrived is sent again, after any crash of either side; receivers tell
duplicates by the number of the event. A receiver that is away costs nothing, because the log is the queue; only what
retention removes meanwhile is lost to it, and that is said. Nothing here writes to the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
from collections.abc import Iterator
from itertools import islice

import msgspec

from cloister import __version__
from cloister.audit import kept
from cloister.audit.kept import Kept
from cloister.audit.rendering import Origin
from cloister.audit.verify import position_of
from cloister.host.audit_files import DamagedFileError, read_lines, segments
from cloister.host.audit_follow import Following, Line, last_number
from cloister.runs.audit_targets import Item, Target, waiting_of

POLL_S = 0.5
"""How often a log is looked at that has nothing new."""
_BACKOFF_S = (1.0, 60.0)
_PORTION = 500
_SAVE_EVERY_S = 1.0
_LATE_NS = 60_000_000_000
_NAMELESS = "unknown"
"""A log whose first line is not that of a keeper."""


class Cursor(msgspec.Struct):
    """How far a receiver has got; what the cursor file holds."""

    log: str = ""
    """The id of the log; another log begins from its beginning."""
    seq: int = 0
    to: str = ""
    """The receiver, for people."""


class Export:
    """One log, one receiver."""

    def __init__(self, directory: str, cursors: str, name: str, target: Target, origin: Origin) -> None:
        """Go on where the cursor file in `cursors` stands; `name` is the receiver's URL.

        Raises:
            OSError: the cursor file cannot be read.
        """
        self.name = name
        self._directory, self._target, self._origin = directory, target, origin
        self._path = f"{cursors}/{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        self._cursor = _read_cursor(self._path)
        self._saved = self._cursor.seq
        self._save_at = 0.0
        self._following: Following | None = None
        self._waiting: Iterator[Item] = iter(())
        self._failures = 0
        self._removed = 0
        self.unreadable = 0
        """Lines that are no events, which were passed over."""
        self.news: list[str] = []
        """What people should know; emptied by whoever tells it."""

    @property
    def arrived(self) -> int:
        """The number of the last event that needs not be sent again."""
        return self._cursor.seq

    def turn(self, now: float) -> float:
        """Do a bit; return after how many seconds to come again. `now` is monotonic time, in seconds."""
        try:
            self._target.look()
            self._note(now)
            if self._following is None and not self._begin():
                return POLL_S
            sent = self._send()
            self._note(now)
        except (OSError, ValueError, DamagedFileError) as error:
            return self._fail(error)
        if sent and self._failures:
            self.news.append(f"{self.name} is reached again")
            self._failures = 0
        return 0.0 if sent else POLL_S

    def close(self) -> None:
        """Let go of the receiver; what was sent last is sent again next time if it is not known to have arrived."""
        with contextlib.suppress(OSError):
            self._target.look()
            self._note(float("inf"))
        self._target.close()

    @property
    def idle(self) -> bool:
        """Whether all that was read has arrived."""
        return self._following is not None and self._cursor.seq >= self._following.after

    def _begin(self) -> bool:
        """Begin to follow: after the last event that arrived, or from the beginning of a log that is another one."""
        log = log_id(self._directory)
        if not log:
            return False
        if log != self._cursor.log:
            self._cursor = Cursor(log=log, seq=0, to=self.name)
        elif (last := last_number(self._directory)) < self._cursor.seq:
            self.news.append(f"the log ends at {last}, {self.name} has {self._cursor.seq}: cloister audit verify")
            self._cursor.seq = segments(self._directory)[-1].first - 1
        self._origin = msgspec.structs.replace(self._origin, log=log)
        self._target.arrived = self._cursor.seq
        self._following = Following(self._directory, self._cursor.seq)
        self._waiting, self._removed = iter(()), 0
        return True

    def _send(self) -> bool:
        """Send one portion; return whether there was any."""
        assert self._following is not None  # noqa: S101  # `turn` has begun
        portion = list(islice(self._waiting, _PORTION))
        if not portion:
            lines = self._following.more()
            if not lines:
                return False
            self._tell_removed(self._following)
            self.unreadable += self._following.unreadable
            self._following.unreadable = 0
            self._waiting = self._items(lines)
            portion = list(islice(self._waiting, _PORTION))
        if portion:
            self._target.put(portion, self._origin)
        return True

    def _items(self, lines: list[Line]) -> Iterator[Item]:
        for line in lines:
            record: Kept | None = kept.read(line.raw)
            if record is None:
                self.unreadable += 1
            else:
                yield Item(line.raw, record)

    def _tell_removed(self, following: Following) -> None:
        # A first export of an old log begins where the log begins: nothing was missed then.
        if following.removed > self._removed and self._cursor.seq:
            self.news.append(f"{following.removed - self._removed} events were removed before {self.name} had them")
        self._removed = following.removed

    def _note(self, now: float) -> None:
        """Take over what arrived, and write it down at most once a second."""
        self.news += [f"{self.name}: {word}" for word in self._target.complaints]
        self._target.complaints.clear()
        if self._following is None or self._target.arrived <= self._cursor.seq:
            arrived = self._cursor.seq
        else:
            arrived = self._cursor.seq = self._target.arrived
        if arrived != self._saved and now >= self._save_at:
            _write_cursor(self._path, msgspec.structs.replace(self._cursor, to=self.name))
            self._saved, self._save_at = arrived, now + _SAVE_EVERY_S

    def _fail(self, error: Exception) -> float:
        """Begin again from what arrived, later and later."""
        self._target.close()
        self._following = None
        if not self._failures:
            self.news.append(f"events do not reach {self.name}: {error}; they are kept in the log and sent later")
        self._failures += 1
        first, longest = _BACKOFF_S
        wait = min(longest, first * float(1 << min(self._failures - 1, 10)))
        asked = waiting_of(error) if isinstance(error, OSError) else 0.0
        return max(asked, wait * random.uniform(0.7, 1.0))  # noqa: S311  # spreads hosts, guards nothing


def log_id(directory: str) -> str:
    """Return the id of the log in a directory; empty while there is no line in it.

    Raises:
        OSError: it cannot be read.
    """
    try:
        there = segments(directory)
    except FileNotFoundError:
        return ""
    for segment in there[:1]:
        for lines, _ in read_lines(segment):
            if lines:
                position = position_of(lines[0])
                return (position.log if position is not None else "") or _NAMELESS
    return ""


def here(log: str = "") -> Origin:
    """Return what says where a log of this host comes from."""
    return Origin(host=socket.gethostname(), log=log, version=__version__)


def before(directory: str, since_ns: int) -> int:
    """Return the number of a line before which nothing happened at `since_ns` or later, as far as segments tell.

    Times in a log are not strictly in order, so a minute is left for what was late.

    Raises:
        OSError: the log cannot be read.
    """
    found = 0
    for segment in segments(directory):
        first = next((lines[0] for lines, _ in read_lines(segment) if lines), b"")
        record = kept.read(first) if first else None
        if record is None or record.time > since_ns - _LATE_NS:
            break
        found = segment.first - 1
    return found


def _read_cursor(path: str) -> Cursor:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(4096), type=Cursor)
    except (FileNotFoundError, msgspec.DecodeError):
        return Cursor()


def _write_cursor(path: str, cursor: Cursor) -> None:
    """Replace the cursor file as a whole. Losing it to a power cut means duplicates, so it is not synced."""
    with open(f"{path}.new", "wb") as file:
        file.write(msgspec.json.encode(cursor) + b"\n")
    os.rename(f"{path}.new", path)
