"""One entry of `egress.allow` or `egress.deny`, parsed strictly, and whether one covers another.

Syntax only: which address a name has, and what the proxy does with a request, is for
`egress`. A host has one accepted spelling here (lower case letters, digits, `-` and `_`; an
address as `ipaddress` prints it), so that two rules can be compared; spellings that mean an
address to some resolvers (`127.1`, `0x7f.1`, `2130706433`) are refused, not understood.
Names: RFC 1123 section 2.1, with `_` since DNS has it in use (RFC 8552).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from cloister.policy.model import EgressRule

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORT = 443
HOST_LOOPBACK = "host.cloister.internal"
"""The reserved name for the host's own loopback; it needs a rule that names it with its port."""
_RESERVED = "cloister.internal"
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}")
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]*")
_MAX_NAME = 253


@dataclass(frozen=True, slots=True)
class HostRule:
    """A parsed rule."""

    kind: Literal["name", "below", "network"]
    """`name` is one name, `below` is `*.name`, `network` is an address or CIDR."""
    host: str
    """The name without `*.`, or the network as text."""
    port: int | None
    """The TCP port; None means every port, which only a deny rule can."""
    methods: frozenset[str] = frozenset()
    """Empty means all."""
    paths: tuple[str, ...] = ()
    """Empty means all."""

    def text(self) -> str:
        """Return the rule as one writes it, without methods and paths."""
        host = f"*.{self.host}" if self.kind == "below" else self.host
        if self.kind == "network":
            network = ipaddress.ip_network(self.host)
            host = str(network.network_address) if network.num_addresses == 1 else str(network)
            host = f"[{host}]" if ":" in host and self.port is not None else host
        return host if self.port is None else f"{host}:{self.port}"

    def covers(self, other: HostRule) -> bool:
        """Return whether everything the other rule matches is matched by this one; False where that is not certain."""
        if self.port is not None and self.port != other.port:
            return False
        if self.methods and not (other.methods and other.methods <= self.methods):
            return False
        if self.paths and not (other.paths and all(_any_covers(self.paths, path) for path in other.paths)):
            return False
        if self.kind == "network":
            return other.kind == "network" and network_covers(self.host, other.host)
        if self.kind == "name":
            return other.kind == "name" and other.host == self.host
        below = other.host.endswith("." + self.host)
        return (other.kind == "name" and below) or (other.kind == "below" and (below or other.host == self.host))


def parse_rule(entry: str | EgressRule, *, deny: bool = False) -> HostRule:
    """Return the parsed rule; without a port it means 443, and every port for a deny rule.

    Raises:
        ValueError: a sentence for people that says what is wrong with the host, port, method or path.
    """
    if isinstance(entry, str):
        host, port = _split_port(entry)
        methods: tuple[str, ...] = ()
        paths: tuple[str, ...] = ()
    else:
        host, port, methods, paths = entry.host, entry.port, entry.methods, entry.paths
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    port = port if port is not None or deny else DEFAULT_PORT
    kind, name = _parse_host(host, deny=deny)
    if name == _RESERVED or (name.endswith("." + _RESERVED) and name != HOST_LOOPBACK):
        raise ValueError(f"{_RESERVED} is reserved for the proxy; the host's own loopback is {HOST_LOOPBACK}:PORT")
    for method in methods:
        if not _METHOD.fullmatch(method):
            raise ValueError("a method is written in capitals, such as GET")
    for path in paths:
        parse_path(path)
    return HostRule(kind, name, port, frozenset(methods), tuple(paths))


def parse_network(text: str) -> Network:
    """Return an address or CIDR; raise ValueError for host bits, zone ids and old spellings."""
    if "%" in text:
        raise ValueError("an address in a policy has no zone id")
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        if "host bits" in str(error):
            right = ipaddress.ip_network(text, strict=False)
            raise ValueError(f"the CIDR has bits set behind its prefix: write {right}") from error
        raise ValueError("not an address or CIDR, such as 192.168.1.10 or 10.0.0.0/8") from error


def parse_path(pattern: str) -> str:
    """Return a path pattern as it is; raise ValueError where a proxy could read it in two ways."""
    segments = pattern.split("/")[1:]
    if not _PATH.fullmatch(pattern):
        raise ValueError("a path pattern begins with / and holds no spaces, queries or %-escapes")
    if any(part in {".", ".."} for part in segments) or "" in segments[:-1]:
        raise ValueError("a path pattern has no //, /./ or /../")
    if any("**" in part for part in segments[:-1]) or ("**" in segments[-1] and segments[-1] != "**"):
        raise ValueError("** stands only at the end, as /**")
    return pattern


def network_covers(wide: str, narrow: str) -> bool:
    """Return whether one CIDR lies within another of the same family."""
    outer, inner = ipaddress.ip_network(wide), ipaddress.ip_network(narrow)
    if isinstance(outer, ipaddress.IPv4Network) and isinstance(inner, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(outer, ipaddress.IPv6Network) and isinstance(inner, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


def _any_covers(patterns: tuple[str, ...], path: str) -> bool:
    """Judge patterns without wildcards in the middle; anything else only covers itself."""
    for pattern in patterns:
        if pattern == path:
            return True
        if pattern.endswith("/**") and "*" not in pattern[:-2] and path.startswith(pattern[:-2]):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int | None]:
    """Split `host`, `host:port`, `[v6]:port`, or a bare IPv6 address or CIDR."""
    if "://" in entry:
        raise ValueError("a rule is a host and a port, not an address with http://")
    if entry.startswith("["):
        host, bracket, rest = entry[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address with a port is written [2001:db8::1]:443")
        port = rest[1:] if rest else None
    elif entry.count(":") > 1:
        return entry, None
    else:
        host, colon, port_text = entry.partition(":")
        port = port_text if colon else None
    if port is None:
        return host, None
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:  # noqa: PLR2004  TCP
        raise ValueError("a port is a number from 1 to 65535")
    return host, int(port)


def _parse_host(host: str, *, deny: bool) -> tuple[Literal["name", "below", "network"], str]:
    if host == "*":
        raise ValueError('* alone would be the whole internet: say so with mode = "learn" or "internet"')
    if ":" in host or "/" in host or re.fullmatch(r"[0-9]+(\.[0-9]+){3}", host):
        return "network", str(parse_network(host))
    below = host.startswith("*.")
    name = host[2:] if below else host
    _check_name(name)
    if below and "." not in name and not deny:
        raise ValueError(f"*.{name} is a whole top-level domain: name the domain below it")
    return ("below" if below else "name"), name


def _check_name(name: str) -> None:
    if not name or len(name) > _MAX_NAME:
        raise ValueError(f"a host name has 1 to {_MAX_NAME} characters")
    if name != name.lower():
        raise ValueError(f"a host name is written in lower case: {name.lower()[:80]}")
    if name.endswith("."):
        raise ValueError("a host name is written without the closing dot")
    if "*" in name:
        raise ValueError("the only wildcard is a leading *. for every name below a domain")
    if not name.isascii():
        raise ValueError("a host name is written in its ASCII form (xn--…)")
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("a host name has only letters, digits, - and _ between its dots, 1 to 63 each")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError("some resolvers read this name as an address: write the address with all four numbers")
