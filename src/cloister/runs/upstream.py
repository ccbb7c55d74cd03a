"""The proxy that all traffic of a run goes through, from `egress.upstream_proxy`.

A policy holds no credentials, so `http://host:port` there has none; `env` takes the broker's own
`https_proxy`, with its credentials, and `no_proxy`. Only proxies that speak plain HTTP on their
own connection are known (what goes through the tunnel is encrypted as ever): others are refused,
never gone round.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from cloister.egress.bypass import parse_bypass
from cloister.errors import UnsupportedError
from cloister.relay.session import UpstreamProxy

_NAMES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""In curl's order. Everything goes through one proxy, plain HTTP as well: by CONNECT."""


def upstream_proxy(key: str, environment: Mapping[str, str]) -> UpstreamProxy | None:
    """Return the proxy that a policy means, or None for none.

    Args:
        key: the value of `egress.upstream_proxy`, checked by the policy's loader.
        environment: the broker's own, read for `env` only.

    Raises:
        UnsupportedError: the environment names a proxy of a kind that is not known.
    """
    if not key:
        return None
    if key != "env":
        return _parse(key, "egress.upstream_proxy")
    name = next((name for name in _NAMES if environment.get(name)), "")
    if not name:
        return None
    value = environment[name]
    bypass = parse_bypass(environment.get("no_proxy") or environment.get("NO_PROXY") or "")
    return dataclasses.replace(_parse(value if "://" in value else f"http://{value}", name), direct=bypass)


def _parse(text: str, where: str) -> UpstreamProxy:
    """Read `http://[user[:password]@]host[:port]`; the text is shown in no error, for it may hold a password."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme != "http" or not host or parts.path not in {"", "/"} or not host.isascii():
        raise UnsupportedError(
            "upstream-proxy",
            "only upstream proxies of the form http://host:port are supported",
            where=where,
            remedy='set upstream_proxy = "http://host:port", or unset the variable',
        )
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return UpstreamProxy(host, port, authorization)
