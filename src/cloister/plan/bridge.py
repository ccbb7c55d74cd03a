"""The bridge of microVMs as data: its names, its network, and what one guest on it has.

Several rooms speak of it: `egress` writes its packet filter, `isolation` its unit, `host` makes it and the taps, `runs`
asks for one. Which network is taken is decided here, from what the host has; nothing else is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import msgspec

from cloister.plan.unit import RUNTIME, STATE

BRIDGE = "cloister-br0"
MAC = "02:c1:01:57:e5:01"
"""Of the bridge: the gateway's, for every guest. Locally administered, and never on any other network."""
TABLE = "cloister_vm"
"""In the families bridge and inet of the host's own network namespace."""
FILE = f"{STATE}/bridge.nft"
"""The packet filter without its guests: it names no address, so it is the same for every network."""
UNIT = "cloister-bridge.service"
PLACE = f"{RUNTIME}/bridge"
"""What is known of the bridge since this boot; what lies there ends with it, as taps do."""
NETWORK_FILE = f"{PLACE}/network.json"
EXPECTED = f"{PLACE}/filter.expected"
"""A digest of what a listing of the packet filter must look like, for this file and this nft."""
TAPS = f"{PLACE}/taps"
TAP_PREFIX = "clvm"
DEFAULT_NETWORK = "10.0.0.0/24"
ALTERNATIVES = (
    "10.77.0.0/24", "10.123.45.0/24", "10.211.99.0/24", "172.29.77.0/24", "172.31.177.0/24",
    "192.168.177.0/24", "192.168.239.0/24",
)  # fmt: skip
"""Where the bridge goes when its network is taken on this host, in this order."""
NOBODYS_MAC = "52:54:00:00:00:00"
"""Of the card of a guest that has no run yet: a template's. The packet filter knows no such guest."""
PREFIX = 24
_ROUTING = 8
"""Routes shorter than this are routing, not a network of neighbours: a VPN has such for half the internet."""
MOST_TAPS = 64
"""Guests of one user on the bridge at once."""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the bridge is, since this boot: `NETWORK_FILE`, root's, readable by all."""

    network: str
    wanted: str
    """What the policy says; where it differs, that was taken."""
    taken_by: str = ""
    """The network of this host that is in the way: of another one than the wanted, or of one with guests on it."""

    @property
    def gateway(self) -> str:
        """The host's address on it: the first one."""
        return str(IPv4Network(self.network)[1])

    def describe(self) -> str:
        """Return one line for people."""
        if self.network == self.wanted and self.taken_by:
            return f"{self.network}, and this host has {self.taken_by}: it moves when no guest is there"
        if self.network == self.wanted:
            return self.network
        return f"{self.network} instead of {self.wanted}, where this host has {self.taken_by}"


class Tap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One guest on the bridge, as hostd writes it down."""

    name: str
    """Of the interface; its number is the last one of the address."""
    mac: str
    """The guest's."""
    own_mac: str
    """The host's end of the tap; a tap that has another one was tampered with."""
    address: str
    gateway: str
    port: int
    """Of the listener that serves its run, at the gateway's address."""
    uid: int
    run: str


def choose_network(wanted: str, taken: Iterable[str]) -> Network:
    """Return where the bridge goes: the wanted network, or the first alternative that this host does not have.

    Args:
        wanted: of the policy, such as 10.0.0.0/24.
        taken: networks and addresses that the host has interfaces or routes for.

    Raises:
        ValueError: all of them are taken.
    """
    there = [network for text in taken if (network := IPv4Network(text, strict=False)).prefixlen >= _ROUTING]
    first = ""
    for text in dict.fromkeys((wanted, *ALTERNATIVES)):
        network = IPv4Network(text)
        meets = next((str(other) for other in there if network.overlaps(other)), "")
        if not meets:
            return Network(network=text, wanted=wanted, taken_by=first)
        first = first or meets
    raise ValueError(f"{wanted} and every alternative are in use on this host, {wanted} by {first}")


def free_numbers(network: str, used: Iterable[str]) -> tuple[int, ...]:
    """Return which last numbers of a /24 no guest has: neither the gateway's nor broadcast's."""
    base = int(IPv4Network(network).network_address)
    busy = {int(IPv4Address(address)) - base for address in used}
    return tuple(number for number in range(2, 255) if number not in busy)


def address_of(network: str, number: int) -> str:
    """Return the address with this last number."""
    return str(IPv4Network(network)[number])


def guest_mac(uid: int, run: str) -> str:
    """Return the MAC of a run's guest, which its monitor is told before there is a tap. Locally administered.

    Two runs may have the same one, by a chance of 1 to 2^32: then the second is refused a place (`taps.make`).
    """
    return f"52:54:{hashlib.sha256(f'{uid} {run}'.encode()).digest()[:4].hex(':')}"


def interface_of(tap: Tap) -> str:
    """Return a guest's address with the length of its network's prefix."""
    return str(IPv4Interface(f"{tap.address}/{PREFIX}"))
