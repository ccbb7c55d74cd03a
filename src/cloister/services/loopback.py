"""Whether a request comes from this machine and means it: for what is answered without a key."""

from __future__ import annotations

from ipaddress import ip_address

from cloister.egress.http1 import Headers
from cloister.relay.exchange import Exchange

_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def names_loopback(headers: Headers) -> bool:
    """Say whether Host is a loopback name.

    A web page can point a name of its own at 127.0.0.1; it cannot choose the Host that the browser sends.
    """
    hosts = [value.decode("latin-1").strip().lower() for name, value in headers if name.lower() == b"host"]
    if len(hosts) != 1:
        return False
    name, colon, port = hosts[0].rpartition(":")
    return (name if colon and port.isdigit() else hosts[0]) in _NAMES


def comes_from_loopback(exchange: Exchange) -> bool:
    """Say whether the other end of a TCP connection is this machine, and was asked for by its loopback address."""
    transport = exchange.connection.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    return peer is not None and ip_address(peer[0]).is_loopback and names_loopback(exchange.headers)
