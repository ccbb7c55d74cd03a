"""The packet filter of agents' accounts on the host, as nft(8) text: by the uid that owns the socket.

The second layer under `isolation = "unit"`. Most agents have a network namespace of their own,
where this table does not count; it is for what runs as an agent's account and yet outside of its
unit (a user manager, cron, a stray process), and for agents in mode `internet`, whose packets leave by
sockets of pasta, a process of the account in the host's network. For those the sets are what `Guard`
refuses: one judge with the relay. All uids of our range are refused whether the table knows them or
not; whoever else's packets pay for one look into a map, and are never judged.

Each packet is judged by itself, never by connection, so a new table counts for old connections.
TCP is answered with a reset; everything else gets EPERM at the sender, so nothing hangs (an ICMP
answer did, for IPv6). What the table cannot see: packets that are forwarded (they have no socket;
rootless containers are the uid's own sockets and are seen, bridged ones need root), and sockets
that another uid had made and passed in (they count as that uid's). Text in, text out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network
from typing import Any, NamedTuple

import msgspec

from cloister.egress.addresses import Guard, Network
from cloister.egress.hosts import Address
from cloister.egress.nft import blocked, denied, lifted_embedding, quoted, refused_ranges, shown_range
from cloister.egress.nft_statements import check_statement
from cloister.egress.rules import Rule
from cloister.plan.firewall import TABLE
from cloister.plan.unit import FIRST_UID, UID_COUNT

_LOOPBACK = IPv4Network("127.0.0.0/8")
_COUNTER = re.compile(r"(sent|refused)_([0-9]{1,10})")
_HEAD = f"""\
table inet {TABLE} {{}}
delete table inet {TABLE}
table inet {TABLE} {{
"""
_COMMON = """\
	counter refused_others { comment "uids of ours that the policy does not know" }
	chain refuse {
		counter name meta skuid map @refused_by
		meta l4proto tcp reject with tcp reset
		drop
	}
	chain closed {
		goto refuse
	}
	chain pass {
		meta l4proto != { tcp, udp, icmp, icmpv6 } goto refuse
		counter name meta skuid map @sent_by
		accept
	}
"""
_INTERNET = """\
	chain internet{number} {{
{asked}\
		ip daddr @refused4_{number} goto refuse
		ip6 daddr @refused6_{number} goto refuse
		meta nfproto ipv6 @nh,256,32 & 0xfdffffff == 0x00005efe goto refuse comment "ISATAP (RFC 5214)"
{opened}\
		fib daddr type {{ local, broadcast, anycast, multicast }} goto refuse comment "the host itself"
		goto pass
	}}
"""
_OUTPUT = f"""\
	chain output {{
		type filter hook output priority filter; policy accept;
		meta skuid vmap @agents
		meta skuid {FIRST_UID}-{FIRST_UID + UID_COUNT - 1} counter name "refused_others" goto refuse
	}}
}}
"""


class AccountRules(NamedTuple):
    """What the packet filter says of one account."""

    account: str
    uid: int
    guard: Guard | None = None
    """In mode `internet`: what it refuses is refused, and the host's own addresses. None: everything is refused."""
    deny: tuple[tuple[Network, Rule], ...] = ()
    """`egress.deny` entries about addresses (`Ruleset.deny.networks()`); one about paths denies the whole port."""
    block: tuple[Network, ...] = ()
    """`unit.block`."""
    statements: tuple[str, ...] = ()
    """`unit.firewall`."""


class Passed(NamedTuple):
    """What the table counted for one account since it was loaded, in packets, except where bytes are said."""

    sent: int
    sent_bytes: int
    refused: int


def ruleset(accounts: Iterable[AccountRules], resolvers: Iterable[Address] = ()) -> str:
    """Return the text for `nft -f`: one transaction, in which the new table takes the place of the old one.

    Args:
        accounts: all of them.
        resolvers: whom the host asks for names. Accounts in mode `internet` reach their port 53 over UDP, wherever
            they are, since that is how pasta resolves, and no other port of theirs.

    The same accounts give the same text, in whatever order they come.

    Raises:
        ValueError: a uid is not of our range or stands twice, a statement is none (`check_statement`), or a guard
            lifts a network whose addresses embed IPv4 ones, which sets cannot judge.
    """
    known = sorted(accounts, key=lambda each: each.uid)
    _check(known)
    asked = "".join(f"\t\t{_family(one)} daddr {one} udp dport 53 goto pass\n" for one in _in_order(resolvers))
    guards: dict[tuple[object, ...], int] = {}
    chains: list[str] = []
    verdicts: list[str] = []
    for each in known:
        target = "closed"
        if each.guard is not None:
            number = guards.setdefault(_same(each.guard), len(guards))
            if number == len(chains):
                chains.append(_internet(number, each.guard, asked))
            target = f"internet{number}"
        verdicts.append(f"{each.uid} : goto {_own_name(each) or target}")
    own = "".join(_own(each, f"internet{guards[_same(each.guard)]}" if each.guard else "closed") for each in known)
    return _HEAD + _counters(known) + _COMMON + "".join(chains) + own + _map("agents", "verdict", verdicts) + _OUTPUT


def passed(listing: bytes) -> dict[int, Passed]:
    """Read what `nft -j list table inet cloister` printed: counters by uid.

    Raises:
        ValueError: it is not that.
    """
    try:
        items = msgspec.json.decode(listing, type=dict[str, list[dict[str, Any]]])["nftables"]
        found: dict[int, dict[str, tuple[int, int]]] = {}
        for item in items:
            counter = item.get("counter")
            named = _COUNTER.fullmatch(counter["name"]) if counter else None
            if counter and named:
                counted = int(counter["packets"]), int(counter["bytes"])
                found.setdefault(int(named[2]), {})[named[1]] = counted
        return {uid: Passed(*kinds.get("sent", (0, 0)), kinds["refused"][0]) for uid, kinds in found.items()}
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not the counters of our table: {error!r}") from error


def _check(accounts: Sequence[AccountRules]) -> None:
    taken: set[int] = set()
    for each in accounts:
        if not FIRST_UID <= each.uid < FIRST_UID + UID_COUNT:
            raise ValueError(f"{each.account}: {each.uid} is not a uid of ours")
        if each.uid in taken:
            raise ValueError(f"{each.account}: {each.uid} belongs to another account as well")
        taken.add(each.uid)
        for statement in each.statements:
            try:
                check_statement(statement)
            except ValueError as error:
                raise ValueError(f"{each.account}: {statement!r}: {error}") from error
        embedding = lifted_embedding(each.guard) if each.guard else ()
        if embedding:
            raise ValueError(f"{each.account}: {embedding[0]} embeds IPv4 addresses and cannot be lifted here")


def _same(guard: Guard) -> tuple[object, ...]:
    """Return what makes two guards refuse the same; they share their sets then."""
    return guard.refused(), guard.exceptions


def _counters(accounts: Sequence[AccountRules]) -> str:
    lines = [
        f"\tcounter {kind}_{each.uid} {{ comment {quoted(each.account)} }}\n"
        for each in accounts
        for kind in (("sent", "refused") if each.guard else ("refused",))
    ]
    sent = [f'{each.uid} : "sent_{each.uid}"' for each in accounts if each.guard]
    refused = [f'{each.uid} : "refused_{each.uid}"' for each in accounts]
    return "".join(lines) + _map("sent_by", "counter", sent) + _map("refused_by", "counter", refused)


def _map(name: str, kind: str, elements: Sequence[str]) -> str:
    body = ",\n".join(f"\t\t\t{element}" for element in elements)
    listed = f"\t\telements = {{\n{body}\n\t\t}}\n" if elements else ""
    return f"\tmap {name} {{\n\t\ttype uid : {kind}\n{listed}\t}}\n"


def _internet(number: int, guard: Guard, asked: str) -> str:
    """Return the sets and the chain of accounts that share a guard."""
    sets = ""
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        # Their reasons stand in the text only: an element's comment would be kept in the kernel, and compared.
        ranges = refused_ranges(guard, version)
        body = ",\n".join(f"\t\t\t{shown_range(first, last, version)}" for first, last in _joined(ranges))
        sets += f"\tset refused{version}_{number} {{\n\t\ttype {kind}\n\t\tflags interval\n"
        sets += f"\t\telements = {{\n{body}\n\t\t}}\n\t}}\n"
    opened = "".join(f"\t\t{_family(network)} daddr {network} goto pass\n" for network in _opened(guard))
    return sets + _INTERNET.format(number=number, asked=asked, opened=opened)


def _joined(ranges: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int]]:
    """Yield ranges with neighbours joined, whatever their reasons."""
    before: tuple[int, int] | None = None
    for first, last, _ in ranges:
        if before and before[1] + 1 == first:
            before = before[0], last
            continue
        if before:
            yield before
        before = first, last
    if before:
        yield before


def _opened(guard: Guard) -> Iterator[Network]:
    """Yield the exceptions that may lead to the host itself: loopback, and single addresses, as the guard has it."""
    for network in guard.exceptions:
        if network.prefixlen == network.max_prefixlen or _LOOPBACK.overlaps(network):
            yield network


def _own_name(each: AccountRules) -> str:
    return f"own_{each.uid}" if each.deny or each.block or each.statements else ""


def _own(each: AccountRules, target: str) -> str:
    """Return the chain of an account that has rules of its own."""
    name = _own_name(each)
    if not name:
        return ""
    lines = [
        *each.statements,
        *blocked(each.block),
        *denied(each.deny),
        f"goto {target}",
    ]
    body = "".join(f"\t\t{line}\n" for line in lines)
    return f"\tchain {name} {{\n{body}\t}}\n"


def _in_order(addresses: Iterable[Address]) -> list[Address]:
    return sorted(set(addresses), key=lambda one: (one.version, int(one)))


def _family(network: Network | Address) -> str:
    return "ip" if network.version == 4 else "ip6"  # noqa: PLR2004  # the version of IP
