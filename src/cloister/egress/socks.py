"""SOCKS5 (RFC 1928), the server's side: greeting and CONNECT request, as parsers over a buffer.

No authentication: the socket a client comes through says which run it is. BIND and UDP
ASSOCIATE are refused. Each parser returns None while bytes are missing; no message is longer
than 262 bytes, so a buffer is never larger either.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

VERSION = 5
NO_AUTHENTICATION = b"\x05\x00"
NO_ACCEPTABLE_METHOD = b"\x05\xff"
SUCCEEDED, GENERAL_FAILURE, NOT_ALLOWED = 0x00, 0x01, 0x02
COMMAND_NOT_SUPPORTED, ADDRESS_TYPE_NOT_SUPPORTED = 0x07, 0x08
MAX_MESSAGE = 262

_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4


class SocksError(ValueError):
    """A message that is refused: `reply` is what to send before closing (it may be empty)."""

    def __init__(self, explanation: str, reply: bytes) -> None:
        """Keep the sentence and the bytes to send."""
        super().__init__(explanation)
        self.explanation = explanation
        self.reply = reply


class SocksRequest(NamedTuple):
    """A CONNECT request: the host as the client wrote it, the port, and how many bytes it took."""

    host: str
    port: int
    size: int


def reply(code: int) -> bytes:
    """Return a reply with the given code; the bound address is always 0.0.0.0:0, there is none to tell."""
    return bytes((VERSION, code, 0, _IPV4, 0, 0, 0, 0, 0, 0))


def parse_greeting(data: bytes | bytearray) -> int | None:
    """Return the size of the client's greeting, or None while it is incomplete.

    Raises:
        SocksError: when it is not SOCKS5 or does not offer "no authentication".
    """
    if not data:
        return None
    if data[0] != VERSION:
        raise SocksError("only version 5 of SOCKS is served", b"")
    if len(data) < 2 or len(data) < 2 + data[1]:  # noqa: PLR2004 - version and count
        return None
    size = 2 + data[1]
    if 0 not in data[2:size]:
        raise SocksError("the client does not offer SOCKS without authentication", NO_ACCEPTABLE_METHOD)
    return size


def parse_request(data: bytes | bytearray) -> SocksRequest | None:
    """Return the client's request, or None while it is incomplete.

    Raises:
        SocksError: for other commands and address types, a port of 0, and names that are not ASCII.
    """
    if len(data) < 5:  # noqa: PLR2004 - all fixed fields, and one byte more that every form has
        return None
    version, command, reserved, kind = data[:4]
    if version != VERSION or reserved != 0:
        raise SocksError("this is not a SOCKS5 request", reply(GENERAL_FAILURE))
    if command != _CONNECT:
        raise SocksError("only CONNECT is served", reply(COMMAND_NOT_SUPPORTED))
    start, length = (5, data[4]) if kind == _NAME else (4, {_IPV4: 4, _IPV6: 16}.get(kind, 0))
    if kind not in {_IPV4, _NAME, _IPV6}:
        raise SocksError("this address type is unknown", reply(ADDRESS_TYPE_NOT_SUPPORTED))
    size = start + length + 2
    if len(data) < size:
        return None
    raw, port = bytes(data[start : size - 2]), int.from_bytes(data[size - 2 : size], "big")
    if port == 0:
        raise SocksError("port 0 cannot be connected to", reply(NOT_ALLOWED))
    return SocksRequest(_host(kind, raw), port, size)


def _host(kind: int, raw: bytes) -> str:
    """Return the host as text; what it means is for `hosts.parse_host` to say."""
    if kind == _IPV4:
        return str(IPv4Address(raw))
    if kind == _IPV6:
        return str(IPv6Address(raw))
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        raise SocksError("the name is not ASCII", reply(NOT_ALLOWED)) from None
