"""One row of the ledger: what one call of a model cost. Where rows are kept is for `host/ledger.py`.

Raw counters are kept beside the price they were multiplied with, so that a cost can be computed again when a price
turns out wrong. Tokens are disjoint: `input_tokens` are those that were neither read from nor written to a cache,
whatever the upstream counts together (OpenAI's `prompt_tokens` include cached ones, Anthropic's do not).
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

Source = Literal["provider", "estimated"]
"""Whether the upstream told the usage, or it was estimated from what went over the wire."""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call that was dispatched to an upstream, or refused before it was (`status` 429 and no upstream)."""

    id: str
    """Ours, unique: 26 characters that sort by time. The accounting journal and the ledger know a call by it."""
    time: float
    """When the request was complete, in seconds since the epoch."""
    run: str
    agent: str
    user: str
    provider: str = ""
    """The name in `[providers]`; empty when the call was refused before one was chosen."""
    route: str = ""
    """`messages`, `count_tokens`, `chat`, `responses`, `embeddings`, `models`."""
    model: str = ""
    """What the upstream says it used, else what was asked for."""
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    """With reasoning tokens."""
    reasoning_tokens: int = 0
    """Those of `output_tokens` that were reasoning, where the upstream tells."""
    cost_usd: float = 0.0
    price: str = ""
    """The date of the price list and the entry that was used; `upstream` where the answer told its cost."""
    source: Source = "provider"
    status: int = 0
    """The HTTP status the agent got; 0 when it got none."""
    outcome: str = "complete"
    """`complete`, `client-left`, `truncated`, `upstream-failed`, `refused`, `unknown` (the broker died meanwhile)."""
    reason: str = ""
    """For refusals: the kebab-case reason."""
    stream: bool = False
    attempts: int = 1
    """Requests sent upstream for this call, retries and fallbacks included."""
    first_byte_s: float = 0.0
    """From the complete request to the first byte of the answer's body."""
    duration_s: float = 0.0
    request_id: str = ""
    """The upstream's own id (`request-id`, `x-request-id`)."""


class Spent(msgspec.Struct, frozen=True):
    """What an agent has used up in a span of time."""

    requests: int = 0
    tokens: int = 0
    cost_usd: float = 0.0


class Books(Protocol):
    """Where calls are written down. None of it waits for a disk or a database: model traffic does not stop for it."""

    def opened(self, row: Row) -> None:
        """Note a call before it is dispatched, with its whole reservation as `estimated` and the outcome `unknown`.

        When this returns, a `kill -9` of this process does not lose the call: the next start counts it as noted.

        Raises:
            OSError: it cannot be noted; the call must not be dispatched then.
        """
        ...

    def closed(self, row: Row) -> None:
        """Put the final row in place of the one that was opened. Never raises: a row that cannot be written is kept."""
        ...

    def refused(self, row: Row) -> None:
        """Write down a call that never left."""
        ...

    def spent(self, agent: str, since: float, until: float, run: str = "", user: str = "") -> Spent:
        """Return what an agent used of `since` <= time < `until`, in all runs or one; rows on their way included.

        With `user` only that user's calls count, where several share a ledger. May wait for a database.

        Asked once per agent and span when a budget is first used, so that budgets survive a restart.
        """
        ...
