"""The host's own addresses and networks: an agent must reach neither the host nor its neighbours.

Read from `/proc/net` (proc_net(5)); nothing is spawned and nothing judged.
"""

from __future__ import annotations

import contextlib
import ipaddress
import sys

_SHORTEST_IPV4 = 8
_SHORTEST_IPV6 = 32
"""Shorter prefixes are not a network of neighbours but routing."""


def own_addresses() -> tuple[str, ...]:
    """Return every IPv4 and IPv6 address of the host."""
    found: dict[str, None] = {}
    for address in (*_ipv6("/proc/net/if_inet6"), *_ipv4("/proc/net/fib_trie")):
        found[address] = None
    return tuple(found)


def attached_networks() -> tuple[str, ...]:
    """Return the networks the host has an address in: its neighbours are there, also with public addresses.

    A route without a gateway alone means little: a VPN has such routes for half the internet.
    """
    own = [ipaddress.IPv4Address(text) for text in _ipv4("/proc/net/fib_trie")]
    found = dict.fromkeys(_ipv6_networks("/proc/net/if_inet6"))
    for network in _ipv4_routes("/proc/net/route"):
        if network.prefixlen >= _SHORTEST_IPV4 and any(address in network for address in own):
            found[str(network)] = None
    return tuple(found)


def nameservers(path: str = "/etc/resolv.conf") -> tuple[str, ...]:
    """Return the addresses of the host's resolvers, in order (resolv.conf(5)); what is no address is left out."""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.split()
                if len(words) > 1 and words[0] == "nameserver":
                    with contextlib.suppress(ValueError):
                        found.append(str(ipaddress.ip_address(words[1].partition("%")[0])))
    except OSError:
        return ()
    return tuple(found)


def _ipv6_networks(path: str) -> list[str]:
    """Read addresses with their prefix lengths; the third field is the length in hexadecimal."""
    found = []
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                words = line.split()
                length = int(words[2], 16)
                if _SHORTEST_IPV6 <= length < ipaddress.IPV6LENGTH:
                    found.append(str(ipaddress.IPv6Network((int(words[0], 16), length), strict=False)))
    except (OSError, ValueError, IndexError):
        return found
    return found


def _ipv4_routes(path: str) -> list[ipaddress.IPv4Network]:
    """Read the routes that need no gateway. Numbers are hexadecimal, in the byte order of the machine."""
    found = []
    try:
        with open(path, encoding="ascii") as file:
            for line in list(file)[1:]:
                words = line.split()
                target, gateway, mask = (
                    int.from_bytes(bytes.fromhex(words[index]), sys.byteorder) for index in (1, 2, 7)
                )
                if gateway == 0:
                    found.append(ipaddress.IPv4Network((target, mask.bit_count())))
    except (OSError, ValueError, IndexError):
        return found
    return found


def _ipv6(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return [str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in file if line.strip()]
    except (OSError, ValueError):
        return []


def _ipv4(path: str) -> list[str]:
    """Read the local leaves of the routing trie: an address line followed by `/32 host LOCAL`."""
    addresses: list[str] = []
    try:
        with open(path, encoding="ascii") as file:
            last = ""
            for line in file:
                words = line.split()
                if words[:1] == ["|--"]:
                    last = words[1]
                elif words[:3] == ["/32", "host", "LOCAL"] and last:
                    addresses.append(last)
    except OSError:
        return []
    return addresses
