"""What an owner may add to the packet filter of one agent: statements of nft(8) that refuse or count, nothing else.

A statement becomes a line of the agent's own chain. So it must not end that line, open a block,
or name a verdict that leads elsewhere. It is taken word by word from a short list: a list of
what is forbidden would have to know all of nft's grammar, of all versions. Whether it means
anything is for nft itself to say, in a network namespace of its own, before anything is loaded.
"""

from __future__ import annotations

import re
from ipaddress import ip_address

from cloister.egress.addresses import parse_network

MAX_LENGTH = 200
_WORDS = frozenset((
    "ip", "ip6", "tcp", "udp", "icmp", "icmpv6", "ipv6-icmp", "th", "meta", "l4proto", "nfproto", "ipv4", "ipv6",
    "daddr", "dport", "sport", "type", "echo-request", "length", "==", "!=", "<", ">", "<=", ">=",
    "counter", "limit", "rate", "over", "burst", "packets", "bytes", "kbytes", "mbytes",
    "reject", "with", "reset", "icmpx", "admin-prohibited", "port-unreachable", "host-unreachable", "no-route", "drop",
))  # fmt: skip
_NUMBER = re.compile(r"[0-9]{1,10}(-[0-9]{1,10})?", re.ASCII)
_RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)", re.ASCII)
_ACTS = ("counter", "reject", "drop")


def check_statement(text: str) -> None:
    """Say whether this may be a line of an agent's chain.

    Raises:
        ValueError: what is wrong with it, in words for its author.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it is longer than {MAX_LENGTH} characters")
    if not text.isascii() or not text.isprintable():
        raise ValueError("it has characters other than printable ASCII")
    words = text.split(" ")
    for word in words:
        if word not in _WORDS and not _is_value(word):
            raise ValueError(_reason(word))
    if not any(act in words for act in _ACTS):
        raise ValueError("it does nothing: end it with reject, drop or counter")


def _is_value(word: str) -> bool:
    """Say whether a word is a number, a rate, an address, a network, or a range of one of these."""
    if _NUMBER.fullmatch(word) or _RATE.fullmatch(word):
        return True
    try:
        if "-" in word:
            first, last = map(ip_address, word.split("-"))
            return first.version == last.version and int(first) <= int(last)
        parse_network(word)
    except ValueError:
        return False
    return "%" not in word


def _reason(word: str) -> str:
    if word in {"accept", "return", "continue"}:
        return f"{word!r}: statements may only refuse or count; `egress.private` opens a network"
    if word in {"jump", "goto", "queue", "vmap"}:
        return f"{word!r} leads out of the agent's own chain"
    if word == "" or set(word) & set("{};,"):
        return (
            "words stand apart by one space, without braces, commas and semicolons: write one statement for each value"
        )
    return f"{word!r} is not a word of such a statement"
