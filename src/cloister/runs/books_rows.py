"""Rows on their way to the ledger: made safe to store, packed for the journal, turned into the columns of the table."""

from __future__ import annotations

import msgspec

from cloister.host.journal import Segment
from cloister.host.ledger import Values
from cloister.llm.ledger import Row

OPENED = 1
"""The kind of a journal's record that notes a call before it is dispatched."""
FINAL = 2
"""The kind of a record that holds a row as it ended, or was refused."""

MOST = 1 << 53
"""No count is larger: beyond it a float, and so JSON, loses whole tokens. An upstream may say anything."""
MOST_USD = 1e9
LAST = 253_402_300_799.0
"""The last second that has a date: 9999-12-31."""
LONGEST = 512
"""Characters of a name. Models and ids are chosen by agents and upstreams."""

_COUNTS = (
    "input_tokens",
    "cache_read_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "output_tokens",
    "reasoning_tokens",
    "status",
    "attempts",
)
_TEXTS = (
    "id",
    "run",
    "agent",
    "user",
    "provider",
    "route",
    "model",
    "price",
    "source",
    "outcome",
    "reason",
    "request_id",
)
_NUMBERS = {"time": LAST, "cost_usd": MOST_USD, "first_byte_s": LAST, "duration_s": LAST}

encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Row)


class Entry:
    """A row in memory, and the segments of the journal that hold it."""

    __slots__ = ("final", "finished", "opened", "row")

    def __init__(self, row: Row, *, final: bool, opened: Segment | None = None) -> None:
        """Note a row."""
        self.row = row
        self.final = final
        self.opened = opened
        self.finished: Segment | None = None


def tokens(row: Row) -> int:
    """Return all tokens of a row that count against a budget."""
    return (
        row.input_tokens
        + row.cache_read_tokens
        + row.cache_write_5m_tokens
        + row.cache_write_1h_tokens
        + row.output_tokens
    )


def safe(row: Row) -> Row:
    """Return a row that any database can hold, and the same one where it already is such: nearly always.

    Nothing unprintable stays in its texts. That also keeps an agent from hiding a forged record of the journal in the
    name of a model: a record has NUL bytes in its length.
    """
    least = min(row.input_tokens, row.cache_read_tokens, row.cache_write_5m_tokens, row.cache_write_1h_tokens)
    text = row.model + row.request_id + row.price + row.provider + row.reason + row.agent + row.run + row.user
    if (
        text.isprintable()
        and len(text) <= LONGEST
        and least >= 0
        and row.output_tokens >= 0
        and 0 <= row.reasoning_tokens <= MOST
        and tokens(row) <= MOST
        and 0.0 <= row.cost_usd <= MOST_USD
        and 0.0 <= row.time <= LAST
        and 0.0 <= row.first_byte_s <= LAST
        and 0.0 <= row.duration_s <= LAST
        and 0 <= row.status <= MOST
        and 0 <= row.attempts <= MOST
    ):
        return row
    return _made_safe(row)


def _made_safe(row: Row) -> Row:
    changes: dict[str, object] = {name: max(0, min(getattr(row, name), MOST // 8)) for name in _COUNTS}
    for name, most in _NUMBERS.items():
        value = getattr(row, name)
        changes[name] = min(value, most) if value > 0 else 0.0  # also where it is no number at all
    for name in _TEXTS:
        kept = "".join(char if char.isprintable() else "\ufffd" for char in getattr(row, name))
        changes[name] = kept[:LONGEST]
    return msgspec.structs.replace(row, **changes)


def decode(payload: bytes) -> Row | None:
    """Return the row of a record, or None when it is of another kind."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError:
        return None


def unseen(row: Row) -> Row:
    """Return the row of a call whose end nobody saw: its reservation, as estimated."""
    return msgspec.structs.replace(row, source="estimated", outcome="unknown")


def values(row: Row) -> Values:
    """Return the columns of a row, in the order of `host.ledger.COLUMNS`."""
    return (*msgspec.structs.astuple(row), tokens(row))
