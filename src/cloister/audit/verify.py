"""The verifier: is this log what its keeper wrote? A state machine over lines; it says what is wrong, and where.

It is fed segment by segment and line by line, in order, and needs the public key alone. An unbroken line costs a hash
and a comparison; what does not fit is looked at closely, so that one damaged line is one finding and the rest is still
verified.

What it cannot see is said in `Report`: lines after the last head bear no signature yet, and whoever holds the key can
write a log that fits. Against the second, heads are noted elsewhere (`Report.tip`) and given as `noted` the next time.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import hexlify, unhexlify
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import msgspec

from cloister.audit.chain import HASH_BYTES, HEAD_LINES, SIGNATURE, TAIL, Position, genesis, key_name, signed

Damage = Literal[
    "changed", "removed", "inserted", "reordered", "truncated", "rewritten", "wrong-key", "head-missing", "not-a-log"
]
Ending = Literal["closed", "open", "torn"]
"""`open`: the keeper lives, or was killed. `torn`: the last line is half written, by kill -9 or a power cut."""
_LINE = re.compile(rb'\{"seq":([1-9][0-9]{0,18}),"time":.*,"hash":"([0-9a-f]{64})"\}', re.DOTALL)
_OWN = b'"kind":"log.'
_MOST = 100
"""Findings that are kept; all are counted."""
_STEP_NS = 2_000_000_000
"""A clock that moved so much against the time since boot was set."""
Check = Callable[[bytes, bytes, bytes], bool]
"""Says whether a signature is right: public key, signature, message."""


class Finding(NamedTuple):
    """One piece of damage."""

    kind: Damage
    segment: str
    line: int
    """In the segment, from 1; 0 where the whole segment is meant."""
    seq: int
    message: str


class _Own(msgspec.Struct):
    """What the verifier reads of the keeper's own events."""

    time: int
    kind: str
    details: dict[str, str | int | float | bool] = {}


class Report(msgspec.Struct, kw_only=True):
    """What was found."""

    log: str = ""
    first: int = 0
    last: int = 0
    lines: int = 0
    segments: int = 0
    heads: int = 0
    signed_to: int = 0
    """The last line that a valid head vouches for; later ones can be changed by whoever can write the files."""
    tip: str = ""
    """`SEQ:HASH` of the last valid head: note it elsewhere, and nothing before it can be changed unnoticed."""
    retired_to: int = 0
    """Lines up to here were removed by the keeper's own retention, and it signed that."""
    ending: Ending = "open"
    torn_bytes: int = 0
    keys: list[str] = []
    """Keys that signed, in order."""
    pinned: bool = False
    """The key was given, not found beside the log."""
    damage: int = 0
    """Findings in all."""
    findings: list[Finding] = []
    notes: list[str] = []
    """What is no damage: clock steps, killed keepers."""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage


class Verifier:
    """Looks at one log; feed it all segments in order, then ask for the `report`."""

    def __init__(self, keys: Iterable[bytes], check: Check, noted: Mapping[int, str] | None = None) -> None:
        """Trust these public keys, and those that heads of theirs introduce.

        Args:
            keys: 32 bytes each.
            check: verifies Ed25519.
            noted: hashes by number of line, of heads that were noted elsewhere; each must be found.
        """
        self._keys = {key_name(key): key for key in keys}
        self._check = check
        self._noted = dict(noted or {})
        self._seen = set[int]()
        self._report = Report()
        self._at = Position(0, b"")
        self._candidates: tuple[bytes, ...] | None = None
        """Set after damage: what the hash before the next line may be; empty means anything."""
        self._before: Position | None = None
        """Where the chain stood before the last damaged line, which may have been inserted."""
        self._missing = set[int]()
        self._gaps: list[tuple[int, int]] = []
        self._segment, self._line = "", 0
        self._last_kind = ""
        self._clock: tuple[str, int, int] = ("", 0, 0)
        self._started = False
        self._first = self._fed = 0
        self._retired = (0, 0)
        self._closed = False

    # --- feeding --------------------------------------------------------------------------

    def begin(self, segment: str, first: int) -> None:
        """Go on with a segment whose name promises this number for its first line."""
        self._segment, self._line = segment, 0
        self._report.segments += 1
        self._first = first

    def feed(self, lines: Iterable[bytes]) -> None:
        """Look at lines of the segment, each without its newline."""
        seq, previous = self._at
        began = self._line
        for line in lines:
            self._line += 1
            text = line[:-TAIL]
            digest = sha256(previous + text).digest()
            if (
                line.endswith(b',"hash":"%b"}' % hexlify(digest))
                and text.startswith(b'{"seq":%d,' % (seq + 1))
                and self._line > 1
                and self._candidates is None
            ):
                seq += 1
                if _OWN in text:
                    self._at = Position(seq, digest)
                    self._own(text, previous, digest)
                previous = digest
                continue
            self._at = Position(seq, previous)
            self._odd(line)
            seq, previous = self._at
        self._at = Position(seq, previous)
        self._fed += self._line - began

    def torn(self, size: int, *, last: bool) -> None:
        """Note an end without a newline: of the last segment it is half a line, elsewhere damage; `size` in bytes."""
        if last:
            self._report.torn_bytes = size
        else:
            self._find("changed", f"the segment ends with {size} bytes that are no line")

    def unreadable(self, why: str) -> None:
        """Note that a compressed segment does not decompress."""
        self._find("changed", f"the segment cannot be read further: {why}")

    def report(self, *, head_file: bool = True) -> Report:
        """Return what was found; the log is over. `head_file` says whether a `HEAD` was there to compare with."""
        report = self._report
        report.last = self._at.seq
        report.lines = self._fed
        self._lost_segments(report)
        self._settle_gaps()
        if not self._started:
            self._find("not-a-log", "there is no line of a log here")
        elif not report.heads:
            self._find("head-missing", "no valid head vouches for any line")
        elif not head_file:
            self._find("head-missing", "the file HEAD is gone, which says where the log ended")
        elif (unsigned := report.last - report.signed_to) > 2 * HEAD_LINES:
            self._find("head-missing", f"{unsigned} lines bear no signature: a keeper signs every {HEAD_LINES}")
        for seq in sorted(self._noted):
            if seq not in self._seen:
                lost = seq > report.last
                what = f"the log ends at {report.last}" if lost else "no such valid head is there any more"
                self._find("truncated" if lost else "rewritten", f"a head was noted at line {seq}: {what}", seq)
        if report.torn_bytes:
            report.ending = "torn"
        elif self._last_kind == "log.closed" or (self._last_kind == "log.head" and self._closed):
            report.ending = "closed"
        return report

    # --- what does not fit ----------------------------------------------------------------

    def _odd(self, line: bytes) -> None:
        """Judge a line that does not simply follow: the first of a segment, or damage."""
        found = _LINE.fullmatch(line)
        if found is None:
            self._damaged("changed", self._at.seq + 1, "this is no line of a log", ())
            return
        seq, text, claimed = int(found[1]), line[:-TAIL], unhexlify(found[2])
        if self._line == 1 and seq != self._first:
            self._find("changed", f"the segment's name promises line {self._first}, its first line is {seq}", seq)
        if not self._started:
            self._anchor(seq, text)
        if seq == self._at.seq + 1:
            self._next(seq, text, claimed)
        elif seq > self._at.seq + 1:
            self._gap(seq, claimed)
        else:
            self._early(seq, text, claimed)

    def _anchor(self, seq: int, text: bytes) -> None:
        """Take the first line of all: where it begins, and what it says was before it."""
        self._started = True
        own = _own(text)
        report = self._report
        report.first = seq
        report.log = str(own.details.get("log", "")) if own else ""
        before = _hash(own.details.get("previous")) if own else None
        if before is None or not report.log:
            self._find("not-a-log", "the first line does not say of which log it is and what was before it", seq)
            self._candidates = ()
        elif seq == 1 and before != genesis(report.log).hash:
            self._find("changed", "the first line does not begin the log whose id it has", seq)
        self._at = Position(seq - 1, before or b"")

    def _next(self, seq: int, text: bytes, claimed: bytes) -> None:
        """Judge a line with the right number."""
        candidates = (self._at.hash,) if self._candidates is None else self._candidates
        fits = not candidates or any(sha256(one + text).digest() == claimed for one in candidates)
        if not fits:
            computed = tuple(sha256(one + text).digest() for one in candidates)
            self._damaged("changed", seq, "the line is not what was hashed", (claimed, *computed))
            return
        sound = self._candidates is None
        before = self._at.hash
        self._at, self._candidates, self._before = Position(seq, claimed), None, None
        if self._line == 1 and not _own(text):
            self._find("changed", "a segment begins with a word of its keeper", seq)
        if _OWN in text:
            proven = before if sound else next((c for c in candidates if sha256(c + text).digest() == claimed), b"")
            self._own(text, proven, claimed)

    def _gap(self, seq: int, claimed: bytes) -> None:
        """Lines are missing before this one, which is taken at its word."""
        first, last = self._at.seq + 1, seq - 1
        self._gaps.append((first, last))
        if last - first < _MOST:
            self._missing |= set(range(first, last + 1))
        place = "whole segments, or the end of one, are" if self._line == 1 else "they are"
        self._find("removed", f"lines {first} to {last}: {place} missing here", first)
        self._before = self._at
        self._at, self._candidates = Position(seq, claimed), None

    def _early(self, seq: int, text: bytes, claimed: bytes) -> None:
        """A number that was passed already: out of its place, a copy, or the true line after an inserted one."""
        before = self._before
        if before and seq == before.seq + 1 and sha256(before.hash + text).digest() == claimed:
            if self._report.findings and self._report.findings[-1].kind == "changed":
                last = self._report.findings.pop()
                self._report.findings.append(last._replace(kind="inserted", message="somebody put this line in"))
            elif seq in self._missing:
                self._find("reordered", f"line {seq} stands after line {self._at.seq}", seq)
                self._missing.discard(seq)
                return
            self._at, self._candidates, self._before = Position(seq, claimed), None, None
            if _OWN in text:
                self._own(text, before.hash, claimed)
        elif seq in self._missing:
            self._missing.discard(seq)
            self._find("reordered", f"line {seq} stands after line {self._at.seq}", seq)
        else:
            self._find("inserted", f"line {seq} was there before", seq)

    def _damaged(self, kind: Damage, seq: int, message: str, candidates: tuple[bytes, ...]) -> None:
        self._find(kind, message, seq)
        self._started = True
        self._before = Position(seq - 1, self._at.hash) if self._candidates is None else self._before
        self._at, self._candidates = Position(seq, self._at.hash), candidates

    def _settle_gaps(self) -> None:
        """What was missing in one place and stood in another was not removed."""
        report = self._report
        for first, last in self._gaps:
            if last - first < _MOST and not self._missing & set(range(first, last + 1)):
                kept = [one for one in report.findings if not (one.kind == "removed" and one.seq == first)]
                report.damage -= len(report.findings) - len(kept)
                report.findings = kept

    def _lost_segments(self, report: Report) -> None:
        """Lines before the first one are gone: by the keeper's own signed word, or by somebody else's hand."""
        if report.first > 1 and report.retired_to < report.first - 1:
            first = report.retired_to + 1
            message = f"lines {first} to {report.first - 1} are missing, and no retention is on record"
            self._find("removed", message, first)

    def _find(self, kind: Damage, message: str, seq: int = 0) -> None:
        self._report.damage += 1
        if len(self._report.findings) < _MOST:
            self._report.findings.append(Finding(kind, self._segment, self._line, seq or self._at.seq, message))

    # --- the keeper's own words ---------------------------------------------------------------

    def _own(self, text: bytes, previous: bytes, digest: bytes) -> None:
        """Read an event of the keeper's own that stands where it should."""
        own = _own(text)
        if own is None:
            return
        self._last_kind = own.kind
        self._look_at_clock(own)
        if own.kind == "log.opened" and own.details.get("after") == "killed":
            self._report.notes.append(f"line {self._at.seq}: the keeper before was killed, or the power was cut")
        if own.kind == "log.retired":
            last = own.details.get("last", 0)
            self._retired = (self._at.seq, last if isinstance(last, int) else 0)
        if own.kind == "log.head":
            self._head(own, text, previous, digest)

    def _head(self, own: _Own, text: bytes, previous: bytes, digest: bytes) -> None:
        report = self._report
        name = str(own.details.get("key", ""))
        key = self._keys.get(name)
        said, mark, _ = text.rpartition(SIGNATURE)
        if own.details.get("log") != report.log:
            self._find("rewritten", "a head of another log")
        elif key is None:
            self._find("wrong-key", f"a head is signed by the key {name}, which is not this log's")
        elif not mark or not self._check(key, _bytes(own.details.get("signature")), signed(previous, said)):
            since = f"a line after {report.signed_to}" if report.signed_to else "a line before it"
            self._find("rewritten", f"the signature of this head is wrong: it, or {since}, is not what was signed")
        else:
            self._valid_head(own, name, digest)

    def _valid_head(self, own: _Own, name: str, digest: bytes) -> None:
        report, seq = self._report, self._at.seq
        if self._noted.get(seq) == digest.hex():
            self._seen.add(seq)
        report.heads += 1
        report.signed_to, report.tip = seq, f"{seq}:{digest.hex()}"
        self._closed = own.details.get("why") == "closed"
        if not report.keys or report.keys[-1] != name:
            report.keys.append(name)
        if self._retired[0]:
            report.retired_to = max(report.retired_to, self._retired[1])
        introduced = _hash(own.details.get("next_key"))
        if introduced:
            self._keys[key_name(introduced)] = introduced

    def _look_at_clock(self, own: _Own) -> None:
        """Compare the clock with the time since boot, both of which the keeper writes down."""
        boot, since = str(own.details.get("boot", "")), own.details.get("boottime", 0)
        if not boot or not isinstance(since, int):
            return
        known, time, before = self._clock
        if known == boot and abs(step := (own.time - time) - (since - before)) > _STEP_NS:
            self._report.notes.append(f"line {self._at.seq}: the clock was set by {step / 1e9:+.1f} s")
        elif known and known != boot and own.time < time:
            self._report.notes.append(f"line {self._at.seq}: the clock is behind that before the reboot")
        self._clock = (boot, own.time, since)


class End(NamedTuple):
    """What a keeper that goes on needs of a line."""

    position: Position
    log: str
    closed: bool


def position_of(line: bytes) -> End | None:
    """Return where a line (without its newline) leaves the chain; None where it is no line."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    own = _own(line[:-TAIL])
    details = own.details if own else {}
    closed = own is not None and (own.kind == "log.closed" or details.get("why") == "closed")
    return End(Position(int(found[1]), unhexlify(found[2])), str(details.get("log", "")), closed)


def _own(text: bytes) -> _Own | None:
    """Return an event of the keeper's own, or None."""
    try:
        own = msgspec.json.decode(text + b"}", type=_Own)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return own if own.kind.startswith("log.") else None


def _hash(value: Any) -> bytes | None:
    """Return 32 bytes that stand as hexadecimal digits, or None."""
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        return None
    return data if len(data) == HASH_BYTES else None


def _bytes(value: Any) -> bytes:
    """Return what stands as base 64; nothing where it does not."""
    try:
        return b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        return b""
