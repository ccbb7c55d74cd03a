"""The packet filter of a run's own network namespace, as nft(8) text: public addresses and nothing else.

In mode `internet` an agent may connect by itself, so the kernel judges addresses where the
relay cannot. Same judge, same table: the refused sets are what `Guard` refuses, taken apart
into ranges that do not overlap. TCP is answered with a reset and everything else with EPERM at
the sender, so nothing hangs (an ICMP answer did, for IPv6). Every set element, deny rule and
verdict counts; `counts` reads the counters back. Text in, text out: nft is run by the shim.

Each packet is judged by itself, never by connection: over IPv6 anyone may bind to a foreign address
(IPV6_FREEBIND), and so could send to a refused one what looks like the answer in a connection it
had opened from there to a public address.

Public DNS servers are public addresses and reachable as such. The one address of ours that
is let through is `Resolver.address`, port 53 over UDP, which pasta maps to the host's resolver.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from typing import Any, NamedTuple

import msgspec

from cloister.egress.addresses import EMBEDDING, Guard, Network
from cloister.egress.hosts import Address
from cloister.egress.rules import Rule

TABLE = "cloister"
MAX_COMMENT = 120  # nft keeps at most 128 bytes of a comment
_HEAD = """\
table inet {table} {{
	counter dns {{ }}
	counter public {{ }}
	counter sent {{ }}
	counter received {{ }}
	counter unsolicited {{ }}
	counter other {{ }}
"""
_CHAINS = """\
	chain refuse {{
		meta l4proto tcp reject with tcp reset
		drop
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
		oifname "lo" accept
		icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
		ip saddr != {source4} counter goto refuse comment "foreign source address"
		ip6 saddr != {source6} counter goto refuse comment "foreign source address"
{denied}\
		{family} daddr {resolver} udp dport 53 counter name "dns" counter name "sent" accept
		ip daddr @refused4 goto refuse
		ip6 daddr @refused6 goto refuse
		meta nfproto ipv6 @nh,256,32 & 0xfdffffff == 0x00005efe counter goto refuse comment "ISATAP (RFC 5214)"
		meta l4proto != {{ tcp, udp, icmp, icmpv6 }} counter name "other" drop
		ct state new counter name "public"
		counter name "sent" accept
	}}
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ct state established ct direction reply counter name "received" accept
		ct state related meta l4proto {{ icmp, icmpv6 }} accept
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
		counter name "unsolicited"
	}}
	chain forward {{
		type filter hook forward priority filter; policy drop;
	}}
}}
"""


class Counts(NamedTuple):
    """What the filter counted over a run. Packets, except where bytes are said."""

    connections: int
    """Packets that opened something: one for each TCP connection (and each retried SYN), UDP exchange or ping."""
    names: int
    """Questions to the host's resolver."""
    sent_bytes: int
    received_bytes: int
    refused: dict[str, int]
    """Refused packets, by what the address is or by the deny rule."""


def ruleset(
    guard: Guard,
    deny: Iterable[tuple[Network, Rule]],
    resolver: Address,
    sources: tuple[Address, Address],
    more: Iterable[str] = (),
) -> str:
    """Return the text for `nft -f`, one transaction.

    Args:
        guard: what it refuses is refused, except `resolver`, port 53 over UDP.
        deny: `egress.deny` entries about addresses; one that speaks of methods or paths denies the whole port.
        resolver: where the sandbox asks for names.
        sources: the sandbox's own addresses, IPv4 and IPv6.
        more: further statements, which refuse or count (`nft_statements`, `blocked`).

    Raises:
        ValueError: the guard lifts a network whose addresses embed IPv4 ones; sets cannot judge those.
    """
    embedding = lifted_embedding(guard)
    if embedding:
        raise ValueError(f"{embedding[0]} embeds IPv4 addresses and cannot be lifted here")
    lines = "".join(f"\t\t{line}\n" for line in (*more, *denied(deny)))
    sets = "".join(_set(f"refused{number}", version, guard) for number, version in ((4, 4), (6, 6)))
    family = "ip" if resolver.version == 4 else "ip6"  # noqa: PLR2004  # the version of IP
    chains = _CHAINS.format(denied=lines, family=family, resolver=resolver, source4=sources[0], source6=sources[1])
    return _HEAD.format(table=TABLE) + sets + chains


def lifted_embedding(guard: Guard) -> tuple[Network, ...]:
    """Return the exceptions of a guard that touch NAT64, 6to4, Teredo and the like."""
    return tuple(
        network
        for network in guard.exceptions
        if network.version == 6 and any(network.overlaps(outer) for outer in EMBEDDING)  # noqa: PLR2004  # IPv6
    )


def counts(text: bytes) -> Counts:
    """Read what `nft -j list table inet cloister` printed.

    Raises:
        ValueError: it is not that.
    """
    try:
        items = msgspec.json.decode(text, type=dict[str, list[dict[str, Any]]])["nftables"]
        named = {item["counter"]["name"]: item["counter"] for item in items if "counter" in item}
        refused: dict[str, int] = {}
        for comment, packets in (*_set_counts(items), *_rule_counts(items)):
            if packets:
                refused[comment] = refused.get(comment, 0) + packets
        if named["other"]["packets"]:
            refused["other protocols"] = named["other"]["packets"]
        return Counts(
            connections=named["public"]["packets"],
            names=named["dns"]["packets"],
            sent_bytes=named["sent"]["bytes"],
            received_bytes=named["received"]["bytes"],
            refused=refused,
        )
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the counters of our table: {error!r}") from error


def _set_counts(items: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    for item in items:
        for element in item.get("set", {}).get("elem", ()):
            yield element["elem"]["comment"], element["elem"]["counter"]["packets"]


def _rule_counts(items: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    for item in items:
        rule = item.get("rule", {})
        for part in rule.get("expr", ()):
            if "comment" in rule and isinstance(part.get("counter"), dict):
                yield rule["comment"], part["counter"]["packets"]


def blocked(networks: Iterable[Network]) -> Iterator[str]:
    """Yield one statement for each network that is refused as a whole."""
    for network in networks:
        family = "ip" if network.version == 4 else "ip6"  # noqa: PLR2004  # the version of IP
        yield f"{family} daddr {network} counter goto refuse"


def denied(deny: Iterable[tuple[Network, Rule]]) -> Iterator[str]:
    """Yield one statement for each rule about addresses; it goes to the chain `refuse`."""
    for network, rule in deny:
        family = "ip" if network.version == 4 else "ip6"  # noqa: PLR2004  # the version of IP
        port = "" if rule.port is None else f" meta l4proto {{ tcp, udp }} th dport {rule.port}"
        yield f"{family} daddr {network}{port} counter goto refuse comment {quoted('deny ' + rule.text)}"


def _set(name: str, version: int, guard: Guard) -> str:
    """Return one interval set, every element with its own counter."""
    elements = [
        f"\t\t\t{shown_range(first, last, version)} counter comment {quoted(why)}"
        for first, last, why in refused_ranges(guard, version)
    ]
    kind = "ipv4_addr" if version == 4 else "ipv6_addr"  # noqa: PLR2004  # the version of IP
    body = ",\n".join(elements)
    return (
        f"\tset {name} {{\n\t\ttype {kind}\n\t\tflags interval\n\t\tcounter\n\t\telements = {{\n{body}\n\t\t}}\n\t}}\n"
    )


def refused_ranges(guard: Guard, version: int) -> list[tuple[int, int, str]]:
    """Return what a guard refuses as disjoint ranges in order: first, last, and what the narrowest network is.

    A sweep over the ends of all networks. Between two ends the refusing networks are the same.
    """
    events: list[tuple[int, int, int]] = []  # position, +1 or -1, row
    rows = [
        (row, network, why, lifted)
        for row, (network, why, lifted) in enumerate(guard.refused())
        if network.version == version
    ]
    width: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for row, network, why, lifted in rows:
        width[row], reasons[row] = network.prefixlen, why
        for first, last in _without(network, lifted):
            events += [(first, 1, row), (last + 1, -1, row)]
    heapq.heapify(events)
    ranges: list[tuple[int, int, str]] = []
    live: dict[int, int] = {}
    before = 0
    while events:
        position, change, row = heapq.heappop(events)
        if live and position > before:
            why = reasons[max(live, key=lambda each: (width[each], each))]
            _append(ranges, before, position - 1, why)
        live[row] = live.get(row, 0) + change
        if not live[row]:
            del live[row]
        before = position
    return ranges


def _append(ranges: list[tuple[int, int, str]], first: int, last: int, why: str) -> None:
    """Add a range, joined with the one before where they touch and mean the same."""
    if ranges and ranges[-1][1] + 1 == first and ranges[-1][2] == why:
        ranges[-1] = (ranges[-1][0], last, why)
    else:
        ranges.append((first, last, why))


def _without(network: Network, lifted: tuple[Network, ...]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a network as ranges when the lifted networks inside it are taken out."""
    at, end = int(network.network_address), int(network.broadcast_address)
    for first, last in sorted((int(each.network_address), int(each.broadcast_address)) for each in lifted):
        if first > at:
            yield at, first - 1
        at = max(at, last + 1)
    if at <= end:
        yield at, end


def shown_range(first: int, last: int, version: int) -> str:
    """Write a range as a prefix where it is one."""
    if version == 4:  # noqa: PLR2004  # the version of IP
        low, high = IPv4Address(first), IPv4Address(last)
        prefixes = [str(network) for network in summarize_address_range(low, high)]
        return prefixes[0] if len(prefixes) == 1 else f"{low}-{high}"
    low6, high6 = IPv6Address(first), IPv6Address(last)
    prefixes = [str(network) for network in summarize_address_range(low6, high6)]
    return prefixes[0] if len(prefixes) == 1 else f"{low6}-{high6}"


def quoted(text: str) -> str:
    """Quote a comment: nft has no escapes, so what could end the string is replaced."""
    safe = "".join(char if " " <= char <= "~" and char not in '"\\' else "?" for char in text)
    return f'"{safe[:MAX_COMMENT]}"'
