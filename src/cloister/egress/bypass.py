"""Hosts that go round an upstream proxy: `no_proxy`, as curl(1) and most programs read it.

There is no standard. Taken are a comma-separated list of names (each stands for itself and for
every name below it, with or without a leading dot), addresses, CIDRs, any of them with a port,
and `*` for everything. Which way a connection takes, not whether it may: that was decided before.
"""

from __future__ import annotations

from typing import NamedTuple

from cloister.egress.addresses import Network, parse_network
from cloister.egress.hosts import Host


class Bypass(NamedTuple):
    """A compiled list."""

    entries: tuple[tuple[str | Network, int | None], ...]
    """Names in lower case (empty: everything) or networks, each with a port or None."""

    def covers(self, host: Host, port: int) -> bool:
        """Say whether a host is reached directly."""
        return any(_is(pattern, host) for pattern, only in self.entries if only in {None, port})


def parse_bypass(text: str) -> Bypass:
    """Compile `no_proxy`. What cannot be read stands for a name that nothing has, so it changes nothing."""
    return Bypass(tuple(_entry(word) for word in text.lower().replace(",", " ").split()))


def _entry(word: str) -> tuple[str | Network, int | None]:
    name, port = _split(word)
    try:
        return parse_network(name), port
    except ValueError:
        return ("" if name == "*" else name.removeprefix("*").strip(".") or "."), port


def _split(word: str) -> tuple[str, int | None]:
    """Split `name:port` and `[address]:port`; an IPv6 address without brackets has no port."""
    if word.startswith("["):
        name, _, rest = word[1:].partition("]")
        port = rest.removeprefix(":")
    elif word.count(":") == 1:
        name, _, port = word.partition(":")
    else:
        return word, None
    return name, int(port) if port.isascii() and port.isdigit() else None


def _is(pattern: str | Network, host: Host) -> bool:
    if not isinstance(pattern, str):
        return host.address is not None and host.address.version == pattern.version and host.address in pattern
    return pattern in {"", host.text} or host.text.endswith("." + pattern)
