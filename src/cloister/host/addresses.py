"""The host's own addresses: an agent must not reach the host through any name of it."""

from __future__ import annotations

import ipaddress


def own_addresses() -> tuple[str, ...]:
    """Return every IPv4 and IPv6 address of the host, from `/proc/net` (proc_net(5)); nothing is spawned."""
    found: dict[str, None] = {}
    for address in (*_ipv6("/proc/net/if_inet6"), *_ipv4("/proc/net/fib_trie")):
        found[address] = None
    return tuple(found)


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
