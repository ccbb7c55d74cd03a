"""Frames of Ethernet as bytes, honest and otherwise: what a guest may write to its network device."""

from __future__ import annotations

import socket
import struct

BROADCAST = "ff:ff:ff:ff:ff:ff"
ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100


def mac(text: str) -> bytes:
    """Return the bytes of a MAC."""
    return bytes.fromhex(text.replace(":", ""))


def frame(to: str, source: str, kind: int, content: bytes) -> bytes:
    """Return a frame."""
    return mac(to) + mac(source) + struct.pack("!H", kind) + content


def tagged(plain: bytes, vlan: int = 1) -> bytes:
    """Return a frame with an 802.1Q tag in it."""
    return plain[:12] + struct.pack("!HH", VLAN, vlan) + plain[12:]


def arp(  # noqa: PLR0913  # the fields of one
    source: str, address: str, asked: str, *, operation: int = 1, to: str = BROADCAST, inner: str = "", of: str = ""
) -> bytes:
    """Return an ARP message: 1 a request, 2 a reply. `inner` is the sender's MAC in it, where that is another one."""
    packed = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    packed += mac(inner or source) + socket.inet_aton(address)
    packed += mac(of or "00:00:00:00:00:00") + socket.inet_aton(asked)
    return frame(to, source, ARP, packed)


def checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (data[-1] << 8 if len(data) % 2 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, to: str, protocol: int, content: bytes, *, fragment: int = 0) -> bytes:
    """Return a packet."""
    ends = socket.inet_aton(source) + socket.inet_aton(to)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(content), 1, fragment, 64, protocol, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + content


def tcp(source: str, to: str, port: int, *, flags: int = 2, own: int = 40000) -> bytes:
    """Return the content of a packet: 2 is SYN."""
    segment = struct.pack("!HHIIBBHHH", own, port, 1000, 0, 0x50, flags, 65535, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(to) + struct.pack("!BBH", 0, 6, len(segment))
    return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


def udp(port: int, content: bytes, own: int = 40000) -> bytes:
    """Return the content of a packet, without a checksum (RFC 768 allows that)."""
    return struct.pack("!HHHH", own, port, 8 + len(content), 0) + content


def ipv6(source: str, to: str, following: int, content: bytes) -> bytes:
    """Return a packet of IPv6."""
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, to)
    return struct.pack("!IHBB", 6 << 28, len(content), following, 255) + ends + content
