"""The tables of a policy that are about model calls: where they go, how many an agent may make, where they are kept.

Part of the model (`policy/model.py`, where its rules stand), in a file of its own.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cloister.policy.table import Count, Money, Table

Protocol = Literal["anthropic", "openai", "openai-responses"]


class Provider(Table, frozen=True):
    """`[providers.NAME]`: where model traffic goes and which secret opens it."""

    protocol: Protocol = "anthropic"
    """The wire protocol the upstream speaks; `openai` is Chat Completions and Embeddings, `openai-responses`
    those and Responses."""
    base_url: str = ""
    """The upstream's address, without the protocol's own path (`/v1/messages`); empty means the provider's public
    one. `http://` is allowed for loopback only."""
    key: str = ""
    """A secret reference such as `file:~/.config/cloister/anthropic.key`; never the secret itself. It is read
    again when it changes, so a key is rotated without a restart. `login:NAME` is a login of `cloister login`, for
    the login's own hosts only. `env:` means the broker's environment, not that of whoever starts a run."""
    auth: Literal["auto", "bearer", "x-api-key", "api-key", "sigv4", "google", "none"] = "auto"
    """How the key opens the upstream. `auto` is `x-api-key` for Anthropic keys, `bearer` for logins and OpenAI;
    `api-key` is Azure's header, `sigv4` signs for AWS, `google` signs in to Vertex, `none` sends no key."""
    region: str = ""
    """The region that `sigv4` signs for."""
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    """Headers sent with every request, such as `anthropic-workspace-id`; they win over the agent's. Never secrets."""
    deny_betas: tuple[str, ...] = ()
    """Values of `anthropic-beta` that this upstream refuses, taken out of requests; all else passes untouched."""
    connect_timeout: str = "10s"
    """Time to open a connection."""
    first_byte_timeout: str = "10m"
    """Time until the first byte of an answer; long prompts take minutes."""
    idle_timeout: str = "5m"
    """Silence within a streamed answer after which it is broken off. There is no limit on the whole time."""
    retries: Annotated[int, msgspec.Meta(ge=0, le=5)] = 0
    """How often a request that was refused with 429, 500, 502, 503, 504 or 529, or not answered at all, is sent
    again before a byte of an answer was seen. Agents retry by themselves, so the default is never."""


class Llm(Table, frozen=True):
    """`[agents.NAME.llm]`: which models, and how much of them."""

    providers: tuple[str, ...] = ()
    """Names from `[providers]` the agent may use, the first of a protocol before others; empty means none."""
    models: tuple[str, ...] = ()
    """Model names or patterns such as `claude-*`; empty means every model of those providers."""
    aliases: dict[str, str] = msgspec.field(default_factory=dict)
    """Names the agent may ask for, each with the model that is meant."""
    requests_per_minute: Count | None = None
    """Requests in any 60 seconds; 60 when left out."""
    concurrency: Count | None = None
    """Requests under way at one time."""
    max_tokens: Count | None = None
    """Output tokens of one request."""
    tokens_per_minute: Count | None = None
    """Input and output tokens in any 60 seconds."""
    tokens_per_run: Count | None = None
    """Input and output tokens of one run."""
    tokens_per_day: Count | None = None
    """Input and output tokens of one day, UTC."""
    tokens_per_month: Count | None = None
    """Input and output tokens of one calendar month, UTC."""
    cost_per_minute_usd: Money | None = None
    """Dollars in any 60 seconds."""
    cost_per_run_usd: Money | None = None
    """Dollars that one run may cost."""
    cost_per_day_usd: Money | None = None
    """Dollars per day, UTC."""
    cost_per_month_usd: Money | None = None
    """Dollars per calendar month, UTC."""
    alerts: tuple[Annotated[int, msgspec.Meta(ge=1, le=100)], ...] = (50, 80, 100)
    """Shares of a budget, in percent, at which a warning is recorded: shown by `ps`, `inspect`, and at the end."""
    on_exhausted: Literal["refuse", "ask"] = "refuse"
    """What happens when a budget is used up: `ask` lets the person at the terminal grant the same amount once more."""
    fallback: bool = False
    """Whether the next provider of the same protocol is tried when one is down or refuses with 429, 5xx or 529."""
    redact: tuple[str, ...] = ()
    """Regular expressions whose matches in prompts are replaced before they leave."""
    redact_secrets: bool = False
    """Whether text in prompts that is shaped like a known token, or is a placeholder, is replaced before it leaves."""
    record: bool = False
    """Whether requests and answers are kept, encrypted, beside the run's records."""


class Ledger(Table, frozen=True):
    """`[ledger]`: where the calls of models are written down."""

    database: str = ""
    """Empty: SQLite among your own records. Else a secret reference to a `postgresql://` address, since it may hold a
    password."""
    retention: str = "400d"
    """How long rows are kept."""
