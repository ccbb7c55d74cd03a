"""The address guard: which IP addresses no name may lead to.

A refused network is lifted only by an exception that lies inside it, and an address in several
refused networks needs all of them lifted: `10.0.0.0/8` opens the private network, but not the
host's own 10.1.2.3 and not a metadata endpoint, which stand here as single addresses. An
address that embeds an IPv4 address (NAT64, 6to4, Teredo, ISATAP) is judged by that one as well.
The sources are the IANA special-purpose registries (RFC 6890 and its successors) and the
providers' manuals. Nothing here resolves or connects.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Literal, NamedTuple

from cloister.egress.hosts import Address, unmap

Network = IPv4Network | IPv6Network

_REFUSED: tuple[tuple[str, str], ...] = (
    ("0.0.0.0/8", "this network (RFC 791)"),
    ("10.0.0.0/8", "private network (RFC 1918)"),
    ("100.64.0.0/10", "carrier-grade NAT and Tailscale (RFC 6598)"),
    ("127.0.0.0/8", "loopback of the host"),
    ("169.254.0.0/16", "link-local (RFC 3927)"),
    ("172.16.0.0/12", "private network (RFC 1918)"),
    ("192.0.0.0/24", "protocol assignments (RFC 6890)"),
    ("192.0.2.0/24", "documentation (RFC 5737)"),
    ("192.88.99.0/24", "6to4 relay anycast (RFC 7526)"),
    ("192.168.0.0/16", "private network (RFC 1918)"),
    ("198.18.0.0/15", "benchmarking (RFC 2544)"),
    ("198.51.100.0/24", "documentation (RFC 5737)"),
    ("203.0.113.0/24", "documentation (RFC 5737)"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved (RFC 1112)"),
    ("255.255.255.255/32", "broadcast"),
    ("::1/128", "loopback of the host"),
    # IPv6: only 2000::/3 is global unicast; the three networks around it make that the default.
    ("::/3", "not global unicast"),
    ("4000::/2", "not global unicast"),
    ("8000::/1", "not global unicast"),
    ("::/96", "IPv4-compatible and unspecified (RFC 4291)"),
    ("::ffff:0:0:0/96", "IPv4-translated (RFC 2765)"),
    ("64:ff9b::/96", "NAT64 (RFC 6052)"),
    ("64:ff9b:1::/48", "local NAT64 (RFC 8215)"),
    ("100::/64", "discard (RFC 6666)"),
    ("2001::/23", "protocol assignments, with Teredo (RFC 2928, RFC 4380)"),
    ("2001:db8::/32", "documentation (RFC 3849)"),
    ("2002::/16", "6to4 (RFC 3056)"),
    ("3fff::/20", "documentation (RFC 9637)"),
    ("fc00::/7", "unique local, the private network of IPv6 (RFC 4193)"),
    ("fd7a:115c:a1e0::/48", "Tailscale"),
    ("fe80::/10", "link-local (RFC 4291)"),
    ("fec0::/10", "site-local (RFC 3879)"),
    ("ff00::/8", "multicast"),
)

_LOOPBACK: dict[str, Kind] = {"127.0.0.0/8": "loopback", "::1/128": "loopback"}

_METADATA: tuple[tuple[str, str], ...] = (
    ("169.254.169.254/32", "cloud metadata"),
    ("169.254.170.2/32", "AWS container credentials"),
    ("169.254.170.23/32", "AWS pod credentials"),
    ("100.100.100.100/32", "Tailscale MagicDNS"),
    ("100.100.100.200/32", "Alibaba Cloud metadata"),
    ("168.63.129.16/32", "Azure host agent"),
    ("192.0.0.192/32", "Oracle Cloud metadata"),
    ("fd00:ec2::/32", "AWS metadata, DNS and time"),
    ("fd20:ce::254/128", "Google Cloud metadata"),
    ("fd00:c1::a9fe:a9fe/128", "Oracle Cloud metadata"),
    ("fd00:42::42/128", "Scaleway metadata"),
)


EMBEDDING: tuple[IPv6Network, ...] = tuple(
    IPv6Network(text)
    for text in ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")
)
"""Networks whose addresses embed an IPv4 address at a fixed place (`embedded`); ISATAP may be in any network."""

Kind = Literal["network", "loopback", "own", "metadata"]


class Refusal(NamedTuple):
    """Why an address is refused: the judged address (it may be an embedded one), the network, and what it is."""

    address: Address
    network: Network
    why: str
    kind: Kind


class Guard:
    """Judges addresses. Immutable; make a new one when the policy or the host's addresses change."""

    def __init__(
        self, own: Iterable[Address] = (), exceptions: Iterable[Network] = (), attached: Iterable[Network] = ()
    ) -> None:
        """Take the host's own addresses, the networks of `egress.private`, and those the host is attached to."""
        # The narrow ones first: they give the better reason.
        self._table = (
            *(_Entry.of(ip_network(text), why, "metadata") for text, why in _METADATA),
            *(_Entry.of(ip_network(unmap(address)), "an address of this host", "own") for address in own),
            *(_Entry.of(network, "a network this host is attached to", "network") for network in attached),
            *(_Entry.of(ip_network(text), why, _LOOPBACK.get(text, "network")) for text, why in _REFUSED),
        )
        self.exceptions = tuple(exceptions)
        self._lifted = {
            entry.network: tuple(_Entry.of(inner) for inner in self.exceptions if _inside(inner, entry.network))
            for entry in self._table
        }

    def check(self, address: Address) -> Refusal | None:
        """Return why the address is refused, or None when it may be dialled."""
        for view in (unmap(address), *embedded(unmap(address))):
            number, version = int(view), view.version
            for entry in self._table:
                if entry.covers(number, version) and not any(
                    inner.covers(number, version) for inner in self._lifted[entry.network]
                ):
                    return Refusal(view, entry.network, entry.why, entry.kind)
        return None

    def refused(self) -> tuple[tuple[Network, str, tuple[Network, ...]], ...]:
        """Return what `check` refuses as a table: network, what it is, and the exceptions inside it.

        An address is refused when one row covers it and none of the row's exceptions does. What an
        address embeds is not in the table: those networks stand in `EMBEDDING`.
        """
        return tuple(
            (entry.network, entry.why, tuple(inner.network for inner in self._lifted[entry.network]))
            for entry in self._table
        )

    def lifts_something(self, network: Network) -> bool:
        """Say whether an exception lies inside a refused network; one that does not is a mistake in the policy."""
        return any(_inside(network, entry.network) for entry in self._table)


class _Entry(NamedTuple):
    """A network as numbers, so that a check is a few dozen shifts and compares."""

    network: Network
    why: str
    kind: Kind
    version: int
    shift: int
    prefix: int

    @classmethod
    def of(cls, network: Network, why: str = "", kind: Kind = "network") -> _Entry:
        shift = network.max_prefixlen - network.prefixlen
        return cls(network, why, kind, network.version, shift, int(network.network_address) >> shift)

    def covers(self, number: int, version: int) -> bool:
        return version == self.version and number >> self.shift == self.prefix


def embedded(address: Address) -> list[IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address would lead to through a translator or tunnel."""
    if isinstance(address, IPv4Address):
        return []
    number = int(address)
    found = []
    if number >> 32 == 0x64FF9B << 64 or number >> 80 == 0x64FF9B0001:  # noqa: PLR2004 - NAT64 in its /96 form (RFC 6052)
        found.append(IPv4Address(number & 0xFFFFFFFF))
    # IPv4-translated, and IPv4-compatible; `::` and `::1` are neither (RFC 4291, 2.5.2, 2.5.3) and stand in the table.
    if number >> 32 == 0xFFFF0000 or (number >> 32 == 0 and number > 1):  # noqa: PLR2004
        found.append(IPv4Address(number & 0xFFFFFFFF))
    if number >> 112 == 0x2002:  # noqa: PLR2004 - 6to4
        found.append(IPv4Address(number >> 80 & 0xFFFFFFFF))
    if number >> 96 == 0x20010000:  # noqa: PLR2004 - Teredo: server, and the client with its bits inverted
        found += [IPv4Address(number >> 64 & 0xFFFFFFFF), IPv4Address(~number & 0xFFFFFFFF)]
    if number >> 32 & 0xFDFFFFFF == 0x5EFE:  # noqa: PLR2004 - ISATAP interface id (RFC 5214), u bit either way
        found.append(IPv4Address(number & 0xFFFFFFFF))
    return found


def _inside(inner: Network, outer: Network) -> bool:
    """Say whether one network lies inside another of the same version."""
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


def parse_network(text: str) -> Network:
    """Read an address or CIDR; v4-mapped networks become IPv4.

    Raises:
        ValueError: when it is neither, or has bits set below its prefix.
    """
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:  # noqa: PLR2004 - the mapped prefix
        mapped = IPv6Address(network.network_address).ipv4_mapped
        if mapped is not None:
            return IPv4Network((mapped, network.prefixlen - 96))
    return network
