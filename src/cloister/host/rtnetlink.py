"""Interfaces, addresses and neighbours of this network namespace, by rtnetlink(7): what the bridge of microVMs needs.

No program is started for it, and nothing is parsed that a person is meant to read. Sources: linux/rtnetlink.h,
linux/if_link.h, linux/neighbour.h, linux/if_bridge.h. It decides nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple, Self

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR, _DONE = 2, 3
_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _GETADDR, _GETROUTE, _NEWNEIGH, _DELNEIGH = 20, 21, 22, 26, 28, 29
_REQUEST, _ACK, _DUMP, _EXCLUSIVE, _CREATE, _REPLACE = 0x01, 0x04, 0x300, 0x200, 0x400, 0x100
_NESTED = 0x8000
_IPV4, _IPV6, _BRIDGE = int(socket.AF_INET), int(socket.AF_INET6), 7
_UP = 1
_IFLA_ADDRESS, _IFLA_NAME, _IFLA_MASTER, _IFLA_PROTINFO, _IFLA_LINKINFO, _IFLA_AF_SPEC = 1, 3, 10, 12, 18, 26
_INFO_KIND, _INFO_DATA, _INFO_PORT, _TUN_PERSIST, _PORT_LEARNING, _PORT_ISOLATED = 1, 2, 5, 6, 8, 33
_IFA_ADDRESS, _IFA_LOCAL, _RTA_DST, _RTA_OIF = 1, 2, 1, 4
_NDA_DST, _NDA_LLADDR = 1, 2
_PERMANENT, _STATIC = 0x80, 0x40
_MASTER_TABLE = 0x04
_UNICAST = 1
_READ = 1 << 17
_LINK_GROUPS = 1 | 1 << 4 | 1 << 6  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE


class Link(NamedTuple):
    """An interface."""

    number: int
    """Its index, by which the kernel knows it."""
    name: str
    mac: str
    master: int
    """Index of the bridge it is a port of; 0: none."""
    up: bool
    kind: str = ""
    """`bridge`, `tun`, ...; empty for a device of the machine."""
    persistent: bool = False
    """A tap that outlives its descriptor."""
    isolated: bool = False
    """A port of a bridge that talks to no other isolated port."""
    learning: bool = False
    """A port of a bridge by which MACs are learnt."""


class Route(NamedTuple):
    """A route: where to, and by which interface."""

    network: str
    interface: int


class Rtnetlink:
    """A connection to the kernel's routing socket. Changes need CAP_NET_ADMIN."""

    def __init__(self) -> None:
        """Connect.

        Raises:
            OSError: the kernel gives no such socket.
        """
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._number = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self._socket.close()

    # --- what there is ---------------------------------------------------------------------

    def links(self) -> list[Link]:
        """Return every interface."""
        found = []
        for body in self._dump(_GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
            _, _, index, flags, _ = _LINK.unpack_from(body)
            values = dict(_attributes(body, _LINK.size))
            about = dict(_attributes(values.get(_IFLA_LINKINFO, b""), 0))
            device, port = (dict(_attributes(about.get(kind, b""), 0)) for kind in (_INFO_DATA, _INFO_PORT))
            kind = _word(about.get(_INFO_KIND, b""))
            found.append(
                Link(
                    number=index, name=_word(values.get(_IFLA_NAME, b"")),
                    mac=_mac_text(values.get(_IFLA_ADDRESS, b"")),
                    master=int.from_bytes(values.get(_IFLA_MASTER, b""), "little"), up=bool(flags & _UP), kind=kind,
                    persistent=kind == "tun" and device.get(_TUN_PERSIST) == b"\1",
                    isolated=port.get(_PORT_ISOLATED) == b"\1", learning=port.get(_PORT_LEARNING) == b"\1",
                )
            )  # fmt: skip
        return found

    def link(self, name: str) -> Link | None:
        """Return the interface of a name, or None."""
        return next((link for link in self.links() if link.name == name), None)

    def addresses(self) -> list[tuple[int, str]]:
        """Return every IPv4 address with its prefix, and the index of its interface."""
        found = []
        for body in self._dump(_GETADDR, _ADDRESS.pack(_IPV4, 0, 0, 0, 0)):
            _, prefix, _, _, index = _ADDRESS.unpack_from(body)
            values = dict(_attributes(body, _ADDRESS.size))
            packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS, b"")
            found.append((index, f"{IPv4Address(packed)}/{prefix}"))
        return found

    def routes(self) -> list[Route]:
        """Return the unicast IPv4 routes of all tables; a default route is 0.0.0.0/0."""
        found = []
        for body in self._dump(_GETROUTE, _ROUTE.pack(_IPV4, 0, 0, 0, 0, 0, 0, 0, 0)):
            _, prefix, _, _, _, _, _, kind, _ = _ROUTE.unpack_from(body)
            values = dict(_attributes(body, _ROUTE.size))
            if kind == _UNICAST:
                network = f"{IPv4Address(values.get(_RTA_DST, bytes(4)))}/{prefix}"
                found.append(Route(network, int.from_bytes(values.get(_RTA_OIF, b""), "little")))
        return found

    # --- changes ---------------------------------------------------------------------------

    def make_bridge(self, name: str, mac: str) -> None:
        """Make a bridge that is down: no spanning tree, no multicast snooping, forwarding at once.

        Raises:
            OSError: the kernel refuses (EEXIST: there is an interface of that name).
        """
        options = _nested(2, _u32(1, 0) + _u32(5, 0) + _u8(22, 0) + _u8(23, 0))
        body = _LINK.pack(0, 0, 0, 0, 0) + _text(_IFLA_NAME, name) + _attribute(_IFLA_ADDRESS, _mac_bytes(mac))
        self._change(_NEWLINK, body + _nested(_IFLA_LINKINFO, _text(1, "bridge") + options), _CREATE | _EXCLUSIVE)

    def quieten(self, index: int) -> None:
        """Have an interface forward no IPv4, answer ARP for its own addresses only, and get no IPv6 address by itself.

        Raises:
            OSError: the kernel refuses.
        """
        # linux/ip.h: FORWARDING 1, PROXY_ARP 3, ACCEPT_REDIRECTS 4, SEND_REDIRECTS 6, RP_FILTER 8, ARP_IGNORE 19
        options = ((1, 0), (3, 0), (4, 0), (6, 0), (8, 1), (19, 1))
        four = _nested(_IPV4, _nested(1, b"".join(_u32(kind, value) for kind, value in options)))
        six = _nested(_IPV6, _u8(8, 1))  # IFLA_INET6_ADDR_GEN_MODE: none
        for families in (four + six, four):  # the second where the kernel has no IPv6
            try:
                self._change(_SETLINK, _LINK.pack(0, 0, index, 0, 0) + _nested(_IFLA_AF_SPEC, families))
            except OSError as error:
                if families == four or error.errno != errno.EAFNOSUPPORT:
                    raise
            else:
                return

    def set_mac(self, index: int, mac: str) -> None:
        """Give an interface an address.

        Raises:
            OSError: the kernel refuses.
        """
        self._change(_SETLINK, _LINK.pack(0, 0, index, 0, 0) + _attribute(_IFLA_ADDRESS, _mac_bytes(mac)))

    def set_up(self, index: int, *, up: bool = True) -> None:
        """Bring an interface up or down.

        Raises:
            OSError: the kernel refuses.
        """
        self._change(_SETLINK, _LINK.pack(0, 0, index, _UP if up else 0, _UP))

    def add_port(self, index: int, bridge: int) -> None:
        """Put an interface into a bridge, alone: isolated, nothing learnt from it, nothing flooded to it.

        Raises:
            OSError: the kernel refuses.
        """
        self._change(_SETLINK, _LINK.pack(0, 0, index, 0, 0) + _u32(_IFLA_MASTER, bridge))
        # linux/if_link.h: GUARD 5, LEARNING 8, UNICAST_FLOOD 9, MCAST_FLOOD 27, BCAST_FLOOD 30, ISOLATED 33
        flags = _u8(5, 1) + _u8(8, 0) + _u8(9, 0) + _u8(27, 0) + _u8(30, 0) + _u8(33, 1)
        self._change(_SETLINK, _LINK.pack(_BRIDGE, 0, index, 0, 0) + _nested(_IFLA_PROTINFO, flags))

    def add_address(self, index: int, address: str) -> None:
        """Give an interface an IPv4 address, such as 10.0.0.1/24.

        Raises:
            OSError: the kernel refuses.
        """
        own = IPv4Interface(address)
        body = _ADDRESS.pack(_IPV4, own.network.prefixlen, 0, 0, index)
        packed = _attribute(_IFA_LOCAL, own.ip.packed) + _attribute(_IFA_ADDRESS, own.ip.packed)
        self._change(_NEWADDR, body + packed, _CREATE | _REPLACE)

    def delete_address(self, index: int, address: str) -> None:
        """Take an IPv4 address from an interface.

        Raises:
            OSError: the kernel refuses.
        """
        own = IPv4Interface(address)
        body = _ADDRESS.pack(_IPV4, own.network.prefixlen, 0, 0, index) + _attribute(_IFA_LOCAL, own.ip.packed)
        self._change(_DELADDR, body)

    def add_station(self, port: int, mac: str) -> None:
        """Say by which port of a bridge a MAC is reached (bridge(8), `fdb add ... master static`).

        Raises:
            OSError: the kernel refuses.
        """
        body = _NEIGHBOUR.pack(_BRIDGE, port, _STATIC, _MASTER_TABLE, 0) + _attribute(_NDA_LLADDR, _mac_bytes(mac))
        self._change(_NEWNEIGH, body, _CREATE | _REPLACE)

    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        """Say which MAC an address has, so that nobody is asked for it (ip-neighbour(8), `nud permanent`).

        Raises:
            OSError: the kernel refuses.
        """
        attributes = _attribute(_NDA_DST, IPv4Address(address).packed) + _attribute(_NDA_LLADDR, _mac_bytes(mac))
        self._change(_NEWNEIGH, _NEIGHBOUR.pack(_IPV4, index, _PERMANENT, 0, 0) + attributes, _CREATE | _REPLACE)

    def delete_neighbour(self, index: int, address: str) -> None:
        """Forget the MAC of an address.

        Raises:
            OSError: the kernel refuses (ENOENT: it knows none).
        """
        body = _NEIGHBOUR.pack(_IPV4, index, 0, 0, 0) + _attribute(_NDA_DST, IPv4Address(address).packed)
        self._change(_DELNEIGH, body)

    def delete(self, index: int) -> None:
        """Delete an interface.

        Raises:
            OSError: the kernel refuses (ENODEV: there is none).
        """
        self._change(_DELLINK, _LINK.pack(0, 0, index, 0, 0))

    # --- messages --------------------------------------------------------------------------

    def _change(self, kind: int, body: bytes, flags: int = 0) -> None:
        for _ in self._ask(kind, body, _ACK | flags):
            pass

    def _dump(self, kind: int, body: bytes) -> list[bytes]:
        return list(self._ask(kind, body, _DUMP))

    def _ask(self, kind: int, body: bytes, flags: int) -> Iterator[bytes]:
        """Send a request; yield the bodies of the answer."""
        self._number += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, self._number, 0) + body)
        while True:
            for answer, number, content in _messages(self._socket.recv(_READ)):
                if number != self._number:
                    continue
                if answer == _DONE:
                    return
                if answer == _ERROR:
                    code = -struct.unpack_from("=i", content)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield content


def listen() -> socket.socket:
    """Return a socket that becomes readable when an interface, an IPv4 address or a route changes.

    Raises:
        OSError: the kernel gives no such socket.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.bind((0, _LINK_GROUPS))
    sock.setblocking(False)
    return sock


def drain(sock: socket.socket) -> None:
    """Read all that such a socket has; what was lost (ENOBUFS) is news as well."""
    while True:
        try:
            sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, number, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, number, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _attributes(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def _attribute(kind: int, content: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + bytes(-len(content) % 4)


def _nested(kind: int, content: bytes) -> bytes:
    return _attribute(kind | _NESTED, content)


def _u8(kind: int, value: int) -> bytes:
    return _attribute(kind, bytes([value]))


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, value.to_bytes(4, "little"))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _word(data: bytes) -> str:
    return data.rstrip(b"\0").decode("ascii", "replace")


def _mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _mac_text(data: bytes) -> str:
    return data.hex(":") if len(data) == 6 else ""  # noqa: PLR2004  # Ethernet's
