"""What the relay is told about one run: rules, resolver, whom to ask, where to record, and how much it may use.

Values and interfaces only. The broker builds a `Session`; the relay never reads configuration.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from cloister.egress.addresses import Guard
from cloister.egress.bypass import Bypass
from cloister.egress.decision import Target, Verdict
from cloister.egress.events import EgressEvent
from cloister.egress.http1 import Headers
from cloister.egress.rules import Ruleset
from cloister.relay.override import override
from cloister.relay.trust import system_trust

if TYPE_CHECKING:
    from cloister.relay.exchange import Exchange

Answer = Literal["once", "run", "always", "never"]
"""What a person says to a question. `always` counts as `run` here; writing it down is for the broker."""


NO_BYPASS = Bypass(())


class Resolver(Protocol):
    """Turns an allowed name into addresses."""

    async def resolve(self, name: str, port: int) -> Sequence[str]:
        """Return addresses in the order to try them.

        Raises:
            OSError: when the name has none or the lookup failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run's use of the relay. There is no limit on the whole time of a request or tunnel."""

    connections: int = 256
    lookups: int = 3
    """DNS lookups at a time: uvloop has four threads for them, and slow names of one run must not stop the others."""
    head_bytes: int = 64 * 1024
    head_fields: int = 200
    pipelined: int = 64
    head_timeout_s: float = 30.0
    """From the first byte of a head (or the connection) to its end."""
    keepalive_timeout_s: float = 120.0
    """Between two requests."""
    idle_timeout_s: float = 3600.0
    """Without a byte in either direction while a request or tunnel is open."""
    connect_timeout_s: float = 20.0
    linger_s: float = 2.0
    """How long the rest of a refused body is read away, so that the client sees the answer and no reset."""


@dataclass(frozen=True, slots=True)
class UpstreamProxy:
    """A proxy that all traffic goes through. It resolves names, so the address guard cannot judge them."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)
    """The whole value of Proxy-Authorization, or nothing."""
    direct: Bypass = NO_BYPASS
    """Hosts that are reached without it; the address guard judges those as ever."""

    @property
    def name(self) -> str:
        """`host:port`, for events."""
        return f"{self.host}:{self.port}"


def _ignore(_event: EgressEvent) -> None:
    """Record nothing."""


class UnansweredError(Exception):
    """Nobody gave an answer. `reason` is `no-terminal` or `not-answered`; the text says why, for people."""

    def __init__(self, reason: str, explanation: str) -> None:
        """Keep both."""
        super().__init__(explanation)
        self.reason = reason
        self.explanation = explanation


async def _refuse(_target: Target) -> Answer:
    """Answer for nobody: refuse once."""
    raise UnansweredError("no-terminal", "there is nobody to ask")


def _no_memory(_target: Target) -> Answer | None:
    """Remember nothing."""
    return None


class Swap(NamedTuple):
    """What leaves in place of what the agent sent, with real secrets in it. Never printed, recorded or kept."""

    path: str
    """The origin-form target, query included."""
    headers: Headers
    masks: tuple[bytes, ...] = ()
    """Byte strings to be masked wherever the answer holds them."""
    used: tuple[str, ...] = ()
    """Names of the credentials that were put in, for the record."""

    @override
    def __repr__(self) -> str:
        """Show nothing of it."""
        return "Swap(...)"


class Broker(Protocol):
    """Real secrets for one run: which hosts they are for, and what they look like on the wire."""

    def terminates(self, host: str, port: int) -> bool:
        """Say whether TLS to this place ends here, because a credential is bound to it."""
        ...

    def certificate(self, host: str) -> ssl.SSLContext:
        """Return a server's context with a certificate for a host, offering `h2` and `http/1.1`."""
        ...

    def body_needed(self, target: Target, headers: Headers) -> int:
        """Return how many bytes of body `swap` wants to see first: 0 for none (signatures cover the body)."""
        ...

    async def swap(self, target: Target, headers: Headers, body: bytes = b"") -> Swap:
        """Put real secrets in where placeholders stand, towards a host they are bound to.

        The headers begin with `host` and hold no field of one connection only; the path has its query.

        Raises:
            RefusedError: a placeholder is on its way to a host it is not bound to, or a secret cannot be had.
        """
        ...

    def leaks(self, data: bytes, place: tuple[str, int] | None = None) -> bool:
        """Say whether bytes hold a placeholder of this run; `overlap` bytes of the chunk before are part of them.

        Args:
            data: of a head or trailer, where every placeholder counts, or of a body.
            place: host and port that a body goes to by TLS that ends here. What is bound to it may stand in the body.
        """
        ...

    @property
    def overlap(self) -> int:
        """Bytes of the last chunk to keep in front of the next one for `leaks`."""
        ...


@dataclass(slots=True)
class Session:
    """One run, as the relay sees it."""

    run: str
    rules: Ruleset
    guard: Guard
    resolver: Resolver | None = None
    """None means the system's resolver."""
    record: Callable[[EgressEvent], None] = _ignore
    ask: Callable[[Target], Awaitable[Answer]] = _refuse
    """Asked in mode `ask`; `UnansweredError`, like any other exception, means refused."""
    recall: Callable[[Target], Answer | None] = _no_memory
    """Returns an answer that was kept (`always` or `never`), before anybody is asked; must not wait."""
    limits: Limits = field(default_factory=Limits)
    upstream: UpstreamProxy | None = None
    broker: Broker | None = None
    """None for a run without credentials: nothing is terminated then."""
    models: Callable[[Exchange], None] | None = None
    """Serves requests of origin form, which are model traffic; None for a run without models."""
    trust: Callable[[bool], ssl.SSLContext] = system_trust
    """The context for servers whose TLS the relay speaks itself; the argument says whether `h2` is offered."""


@dataclass(slots=True)
class Stats:
    """Counters of one server."""

    connections: int = 0
    """Those that asked for something: the self-probe only looks whether the proxy answers."""
    active: int = 0
    denials: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class RefusedError(Exception):
    """A target will not be connected to; the verdict says why."""

    def __init__(self, verdict: Verdict) -> None:
        """Keep the verdict."""
        super().__init__(verdict.explanation)
        self.verdict = verdict


def failed(reason: str, explanation: str) -> RefusedError:
    """Return a refusal that no policy line would change: the network or the server is at fault."""
    return RefusedError(Verdict("deny", reason, explanation=explanation))
