"""An event as it stands in the log: with the sequence number and the hash that its keeper put around it.

Reading decodes strictly by type and leaves out what a newer keeper may have added. Whether the hashes hold is for
`chain`; here a line is only read.
"""

from __future__ import annotations

import functools

import msgspec

from cloister.audit.event import Event
from cloister.audit.kinds import kinds


class Kept(Event, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the log."""

    seq: int = 0
    """Its number in the log, without gaps; 0 where an event is from elsewhere."""
    hash: str = ""


class _Moment(msgspec.Struct, gc=False):
    time: int


_DECODER = msgspec.json.Decoder(Kept)
_MOMENT = msgspec.json.Decoder(_Moment)


def read(line: bytes) -> Kept | None:
    """Return the event of a line, or None when it is none: cut, damaged, or not an event."""
    try:
        return _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def moment(line: bytes) -> int:
    """Return the time of a line, and decode nothing else of it; -1 where it is no event."""
    try:
        return _MOMENT.decode(line).time
    except (msgspec.DecodeError, UnicodeDecodeError):
        return -1


def severity(event: Event) -> int:
    """Return how severe an event is: what it says itself, and no less than its kind."""
    return max(event.severity_id, severities().get(event.kind, 1))


@functools.cache
def severities() -> dict[str, int]:
    """Return the severity of each kind."""
    return {name: kind.severity for name, kind in kinds().items()}
