"""`inject`: how a secret gets into requests, for credentials of agents and secrets of gateways. Values only.

What they must hold together is for `check`; what each scheme does to a request for `credentials/inject.py`.
"""

from __future__ import annotations

from typing import Literal

from cloister.policy.table import Port, Table


class Injection(Table, frozen=True):
    """`[agents.NAME.credentials.NAME.inject]`: how a secret gets into requests to the hosts it is bound to."""

    host: str | tuple[str, ...]
    """The host the secret is sent to, or several; no wildcard. TLS to them ends at the broker."""
    port: Port = 443
    """The port of those hosts."""
    header: str = ""
    """The header that carries it, for the scheme `header`."""
    query: str = ""
    """The query parameter that carries it, for the scheme `query`."""
    value: str = "{secret}"
    """The header's or parameter's value, or the path's segment; `{secret}` is replaced."""
    scheme: Literal["header", "bearer", "basic", "query", "path", "sigv4", "git", "npm", "pip"] = "header"
    """`bearer` and `basic` are Authorization headers; `path` replaces the placeholder in a segment of the path that
    reads as `value`, such as `bot{secret}`; `sigv4` signs for AWS; `git`, `npm` and `pip` know their
    tool's own way, so that nothing has to be set up inside."""
    user: str = ""
    """The user name for `basic`, `git` and `pip`; empty means what the tool's hosts expect (`x-access-token`,
    `__token__`)."""
    methods: tuple[str, ...] = ()
    """HTTP methods the secret is used for, in capitals; empty means all. Others are refused with it."""
    paths: tuple[str, ...] = ()
    """Path patterns the secret is used for, as in an egress rule; empty means all. Others are refused with it."""
