"""The keeper of a log: chains events, writes them, signs heads, rotates, compresses, and removes what is old enough.

One object, whoever holds it: `cloister-auditd` for a system, a thread of the broker for a user without one. It knows
neither sockets nor sources. A write that fails changes nothing: chain and file stand where they stood, and the same
events may be put again. Signing waits until the key is there (`wake`): its library is slow to import.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cloister.audit.chain import HEAD_LINES, Chain, Position, encode, key_name
from cloister.audit.event import Event
from cloister.audit.verify import position_of
from cloister.errors import StepError
from cloister.host import audit_key
from cloister.host.audit_files import KEYS, Head, Segment
from cloister.host.audit_log import Log

HEAD_S = 15.0
"""A line bears a signature, and is on the disk, after so many seconds at the latest."""
_FAR_S = 3600.0
_AGAIN_S = 30.0
"""A rotation that failed is tried again after this."""
_LATEST_BYTES = 8 << 20
Detail = str | int | float | bool


class Rules(NamedTuple):
    """When a segment ends and when it goes: `[audit]` of the policy."""

    rotate_bytes: int = 64 << 20
    rotate_s: float = 86400.0
    retention_s: float = 90 * 86400.0


class Clock(NamedTuple):
    """The clocks a keeper reads; others in tests."""

    now_ns: Callable[[], int] = time.time_ns
    boottime_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    boot: str = ""
    """The kernel's id of this boot."""


def read_boot_id() -> str:
    """Return the id of this boot (random(4)); nothing where the kernel does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class Keeper:
    """The one writer of one log."""

    def __init__(
        self, log: Log, key_directory: str, rules: Rules, *, clock: Clock | None = None, source: str = "auditd"
    ) -> None:
        """Open nothing yet."""
        self._log, self._keys, self.rules = log, key_directory, rules
        self._clock = clock or Clock(boot=read_boot_id())
        self._source = source
        self._key: audit_key.SigningKey | None = None
        self._chain = Chain("")
        self._head_seq = 0
        self._head_due = self._rotate_due = 0
        self._rotate_not_before = 0
        self._headless = False
        """The open segment has no line yet; its first must be a head."""
        self._owed: Head | None = None
        """A head that is written, and not on the disk or not in `HEAD` yet: nothing more is taken before it is."""
        self._began = (0, 0)
        self._to_pack: deque[Segment] = deque()
        self._packing: threading.Thread | None = None
        self.tiers: Callable[[], Mapping[str, Detail]] = dict
        """What each head says of what is active and what was counted."""
        self.seen: Callable[[bytes], None] = lambda _: None
        """Gets the lines that have just been written; never raises."""
        self.due: Callable[[int], None] = lambda _: None
        """Called by each `tick` with the time; never raises."""

    @property
    def log_id(self) -> str:
        """The log's id."""
        return self._chain.log

    @property
    def seq(self) -> int:
        """The number of the last line."""
        return self._chain.seq

    # --- beginning ------------------------------------------------------------------------

    def open(self) -> None:
        """Go on where the log ends, or begin one.

        Raises:
            CloisterError: another keeper, an unsafe place, or a log whose end is not understood.
            OSError: it cannot be read or written; nothing is held then.
        """
        try:
            self._open()
        except BaseException:
            self._log.close()
            raise

    def _open(self) -> None:
        tail = self._log.open()
        self._began = (self._clock.now_ns(), self._clock.boottime_ns())
        after = ""
        if tail.last:
            opening, last = position_of(tail.opening), position_of(tail.last)
            if opening is None or last is None or not opening.log:
                remedy = f"cloister audit verify {self._log.directory}; then move it away, and a new one begins"
                raise StepError("audit-damaged", "the end of the audit log is not understood",
                                where=self._log.directory, remedy=remedy)  # fmt: skip
            self._chain = Chain(opening.log, last.position)
            after = "closed" if last.closed else "killed"
        else:
            self._chain = Chain(secrets.token_hex(16))
        if not self._log.is_open:
            self._log.begin(self.seq + 1)
        details: dict[str, Detail] = {"after": after} if after else {}
        if tail.torn:
            details["torn_bytes"] = tail.torn
        self._head_seq = self.seq  # what was there is signed with what comes now
        self._say("log.opened", "the log goes on" if after else "a log begins", details)
        now = self._clock.boottime_ns()
        self._head_due = now + int(HEAD_S * 1e9)
        self._rotate_due = now + int(self.rules.rotate_s * 1e9)

    def wake(self) -> None:
        """Load the key, and make one where there is none; takes a few dozen milliseconds.

        Raises:
            CloisterError: the key is not safe.
            OSError: it cannot be read or written.
        """
        if self._key is None:
            key = audit_key.open_key(self._keys)
            self._publish(key)
            self._key = key

    # --- writing --------------------------------------------------------------------------

    def put(self, events: Sequence[bytes]) -> None:
        """Append events, each one JSON object as `audit.chain.encode` returns it.

        Raises:
            OSError: none was written; put them again.
        """
        self._settle()
        if self._headless:
            self._write_head("segment", {})
        if self.seq - self._head_seq >= HEAD_LINES:
            self.head("lines")  # before the events: when this fails, none of them is written
        before = self._chain.position
        lines = self._chain.lines(events)
        try:
            self._log.write(lines)
        except OSError:
            self._chain.back_to(before)
            raise
        self.seen(lines)

    def latest(self) -> list[bytes]:
        """Return the last lines of the log, some thousands at most; they are not verified."""
        return self._log.latest(_LATEST_BYTES)

    def now_ns(self) -> int:
        """Return the time, by the clock that events of this keeper bear."""
        return self._clock.now_ns()

    def put_lines(self, make: Callable[[Position], tuple[memoryview, Position]]) -> int:
        """Append lines that others chain (kernel events, in C): `make` gets the end, returns lines and the new end.

        Returns how many bytes were written.

        Raises:
            OSError: none was written; the chain stands where it stood.
        """
        self._settle()
        if self._headless:
            self._write_head("segment", {})
        if self.seq - self._head_seq >= HEAD_LINES:
            self.head("lines")
        before = self._chain.position
        lines, after = make(before)
        if lines:
            self._log.write(lines)
            self._chain.back_to(after)
        return len(lines)

    def say(self, kind: str, message: str, details: Mapping[str, Detail], severity: int = 1) -> None:
        """Append a word of the keeper's own.

        Raises:
            OSError: it was not written.
        """
        self.put([encode(self._event(kind, message, details, severity))])

    def head(self, why: str) -> None:
        """Sign everything up to here, and sync it; without the key, later.

        Raises:
            OSError: it was not written, or not synced.
        """
        if self._key is None:
            return
        self._write_head(why, {})

    def tick(self) -> None:
        """Do what is due: a head, the next segment, removing old ones. Call it about once a second.

        Raises:
            OSError: it could not be written; what was due stays due.
        """
        self.due(self._clock.now_ns())
        self._settle()
        now = self._clock.boottime_ns()
        if now >= self._head_due:
            self._head_due = now + int(HEAD_S * 1e9)
            if self.seq > self._head_seq:
                self.head("time")
        full = self._log.size >= self.rules.rotate_bytes or now >= self._rotate_due
        if full and self._key and now >= self._rotate_not_before:
            self.rotate()

    def rotate(self) -> None:
        """Sign, begin the next segment with a head, compress closed ones, and remove those past their retention.

        Raises:
            OSError: something of it could not be written.
        """
        now = self._clock.boottime_ns()
        self._rotate_not_before = now + int(_AGAIN_S * 1e9)
        self.head("rotated")
        self._log.begin(self.seq + 1)
        self._headless = True
        self._rotate_due = now + int(self.rules.rotate_s * 1e9)
        self._write_head("segment", {})
        self._rotate_not_before = 0
        self._retire()
        self._to_pack.extend(one for one in self._log.closed_segments() if not one.compressed)
        if self._packing is None or not self._packing.is_alive():
            self._packing = threading.Thread(target=self._compress, name="audit-compress", daemon=True)
            self._packing.start()

    def new_key(self) -> None:
        """Sign with a new key from here on; the old one vouches for it.

        Raises:
            OSError: the old one is still in use.
        """
        self.wake()
        fresh = audit_key.SigningKey.generate()
        self._publish(fresh)
        self._write_head("key", {"next_key": fresh.public.hex()})
        audit_key.store_key(self._keys, fresh)
        self._key = fresh
        self.head("key")

    def close(self) -> None:
        """Say that the log ends here, sign it, and let go. Never raises: what could not be written stays open."""
        with contextlib.suppress(OSError, StepError):
            if self._log.is_open:
                self.wake()
                self._say("log.closed", "the keeper ended", {})
                self.head("closed")
        self._log.close()

    # --- inside ---------------------------------------------------------------------------

    def _say(self, kind: str, message: str, details: Mapping[str, Detail]) -> None:
        self.say(kind, message, {**self._own_details(), **details})

    def _own_details(self) -> dict[str, Detail]:
        return {
            "log": self._chain.log,
            "previous": self._chain.hash.hex(),
            "boot": self._clock.boot,
            "boottime": self._clock.boottime_ns(),
        }

    def _event(self, kind: str, message: str, details: Mapping[str, Detail], severity: int = 1) -> Event:
        return Event(
            time=self._clock.now_ns(), kind=kind, message=message, source=self._source, details=dict(details),
            severity_id=severity,  # type: ignore[arg-type]  # 1 to 5
        )  # fmt: skip

    def _write_head(self, why: str, more: Mapping[str, Detail]) -> None:
        assert self._key is not None  # noqa: S101  # callers have looked
        self._settle()
        details = {**self._own_details(), "key": key_name(self._key.public), "why": why, **self.tiers(), **more}
        event, before = self._event("log.head", "", details), self._chain.position
        try:
            self._log.write(self._chain.head(event, self._key.sign))
        except OSError:
            self._chain.back_to(before)
            raise
        self._head_seq, self._headless = self.seq, False
        self._head_due = self._clock.boottime_ns() + int(HEAD_S * 1e9)
        self._owed = Head(self._chain.log, self.seq, self._chain.hash.hex(), event.time)
        self._settle()

    def _settle(self) -> None:
        """Have the last head on the disk and in `HEAD`."""
        if self._owed is not None:
            self._log.sync()
            self._log.note(self._owed)
            self._owed = None

    def _publish(self, key: audit_key.SigningKey) -> None:
        """Put a public key beside the log, behind those that are there."""
        try:
            with open(f"{self._log.directory}/{KEYS}", "rb") as file:
                there = file.read(1 << 20)
        except FileNotFoundError:
            there = b""
        if key.pem not in there:
            self._log.replace(KEYS, there + key.pem)

    def _retire(self) -> None:
        """Sign that segments are past their retention, then remove them; a clock that leapt ahead is not believed."""
        now, boottime = self._clock.now_ns(), self._clock.boottime_ns()
        leap_s = ((now - self._began[0]) - (boottime - self._began[1])) / 1e9
        if leap_s > _FAR_S:
            return
        old = self._log.older_than(now / 1e9 - self.rules.retention_s)
        if not old:
            return
        following = [one.first for one in self._log.closed_segments() if one.first > old[-1].first]
        last = (following[0] if following else self._log.first) - 1
        words = {"first": old[0].first, "last": last, "segments": len(old)}
        self.say("log.retired", f"lines {old[0].first} to {last} are past their retention", words)
        self.head("retired")
        self._log.remove(old)

    def _compress(self) -> None:
        """Work the list off, in a thread of its own. It looks at nothing but what it is given: those are closed."""
        while self._to_pack:
            segment = self._to_pack.popleft()
            with contextlib.suppress(OSError):  # it stays as it was, and the next rotation tries again
                self._log.compress(segment)
