"""A log in memory, as a keeper writes it, with a key of its own: for tests of the chain that touch no machine."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.audit.chain import Chain, encode, key_name
from cloister.audit.event import Endpoint, Event
from cloister.audit.verify import Report, Verifier
from cloister.host.audit_key import check

LOG = "5a" * 16
BOOT = "c7cf9335-d5e2-4064-bc16-e6e966a360db"


class MemoryLog:
    """Segments as lists of lines without newlines, in order."""

    def __init__(self, seed: int = 1) -> None:
        """Begin a log; equal seeds have equal keys."""
        self.key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.public = self.key.public_key().public_bytes(form.Encoding.Raw, form.PublicFormat.Raw)
        self.chain = Chain(LOG)
        self.segments: list[tuple[int, list[bytes]]] = []
        self.noted: dict[int, str] = {}
        self.clock = [1_000_000_000_000_000_000, 5_000_000_000]
        self.begin()
        self.own("log.opened")

    def begin(self) -> None:
        """Begin a segment."""
        self.segments.append((self.chain.seq + 1, []))

    def event(self, host: str = "api.example.org") -> None:
        """Append an event."""
        self.pass_s(0.1)
        event = Event(
            time=self.clock[0], kind="egress.decided", run="0" * 12, endpoint=Endpoint(hostname=host, port=443)
        )
        self._append(self.chain.line(encode(event)))

    def own(self, kind: str, **details: str | int) -> None:
        """Append a word of the keeper's own."""
        self._append(self.chain.line(encode(self._own(kind, details))))

    def head(self, key: Ed25519PrivateKey | None = None, **details: str | int) -> None:
        """Append a head, signed by the log's key or by another."""
        signer = key or self.key
        public = signer.public_key().public_bytes(form.Encoding.Raw, form.PublicFormat.Raw)
        event = self._own("log.head", {"key": key_name(public), **details})
        self._append(self.chain.head(event, signer.sign))
        self.noted = {self.chain.seq: self.chain.hash.hex()}

    def pass_s(self, seconds: float, *, step_s: float = 0.0) -> None:
        """Let time pass, and set the clock by a step."""
        self.clock[0] += int((seconds + step_s) * 1e9)
        self.clock[1] += int(seconds * 1e9)

    def copy(self) -> list[tuple[int, list[bytes]]]:
        """Return the segments, to be damaged."""
        return [(first, list(lines)) for first, lines in self.segments]

    def _own(self, kind: str, details: dict[str, str | int]) -> Event:
        common = {"log": self.chain.log, "previous": self.chain.hash.hex(), "boot": BOOT, "boottime": self.clock[1]}
        return Event(time=self.clock[0], kind=kind, details={**common, **details})

    def _append(self, line: bytes) -> None:
        self.segments[-1][1].append(line[:-1])


def small_log(seed: int = 1) -> MemoryLog:
    """Return a log of three segments with heads, closed in order: 30 lines."""
    log = MemoryLog(seed)
    for number in range(3):
        if number:
            log.head(why="rotated")
            log.begin()
            log.head(why="segment")
        for _ in range(3):
            log.event()
        log.head(why="time")
        for _ in range(3):
            log.event()
    log.own("log.closed")
    log.head(why="closed")
    return log


def look(log: MemoryLog, segments: Sequence[tuple[int, list[bytes]]] | None = None, **options: object) -> Report:
    """Verify segments (the log's own by default) with the log's key and its noted head."""
    noted = options.get("noted", log.noted)
    keys = options.get("keys", [log.public])
    verifier = Verifier(keys, check, noted)  # type: ignore[arg-type]
    for first, lines in segments if segments is not None else log.segments:
        verifier.begin(f"{first:016d}.jsonl", first)
        verifier.feed(lines)
    return verifier.report()
