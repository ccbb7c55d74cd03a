"""What is recorded about one connection or request: the row behind `why`, `learn` and the receipt."""

from __future__ import annotations

import msgspec

from cloister.egress.decision import Action, Protocol


class EgressEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One HTTP request, tunnel, or refused attempt. Denials are recorded at once, the rest at their end."""

    time: float
    """When it began, in seconds since the epoch."""
    protocol: Protocol
    host: str
    """The canonical host, or the client's own spelling (cut at 255 characters) when it was none."""
    port: int
    verdict: Action
    reason: str
    """The kebab-case reason of the verdict, or of the failure that ended it."""
    method: str = ""
    path: str = ""
    """The path of a request that could be read, without its query, which may hold secrets."""
    rule: str = ""
    address: str = ""
    """The address that was dialled; empty when none was, or when an upstream proxy chose it."""
    via: str = ""
    """The upstream proxy, if one was used: the address check was then its business, not ours."""
    status: int = 0
    """The HTTP status the client got; 0 for tunnels."""
    ech: bool = False
    """The TLS hello carried Encrypted Client Hello: the name checked was the outer one."""
    credentials: tuple[str, ...] = ()
    """Names of the credentials whose secret was put into the request."""
    bytes_up: int = 0
    bytes_down: int = 0
    duration_s: float = 0.0
