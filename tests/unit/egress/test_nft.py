"""The packet filter's text: the guard's table and nothing else, told in nft's words, and its counters read back."""

import json
from ipaddress import ip_address, ip_network
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.egress import nft
from cloister.egress.addresses import Guard
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.policy.model import Egress

GOLDEN = Path(__file__).parents[2] / "golden/internet.nft"
SOURCES = (ip_address("192.0.2.2"), ip_address("2001:db8::2"))
RESOLVER = ip_address("192.0.2.53")
EXCEPTIONS = (
    "10.0.0.0/8", "10.1.2.0/24", "192.168.1.20/32", "169.254.0.0/16", "169.254.169.254/32", "100.64.0.0/10",
    "fd00::/8", "fd00:1::/64", "fe80::/10", "203.0.113.7/32",
)  # fmt: skip


def _guard(*exceptions: str) -> Guard:
    own = (ip_address("93.1.2.3"), ip_address("2a01:4f8::5"), ip_address("10.1.2.3"))
    return compile_guard(Egress(private=exceptions), own, (ip_network("2a01:4f8::/64"), ip_network("10.1.2.0/24")))


def test_the_text_is_as_reviewed() -> None:
    """Every change of the filter shows in a diff of the golden file; rewrite that only after reading it."""
    rules = compile_ruleset(Egress(deny=("8.8.8.8", "[2001:4860::/32]:53")))
    text = nft.ruleset(_guard("10.1.0.0/16"), rules.deny.networks(), RESOLVER, SOURCES)

    assert text == GOLDEN.read_text()


@st.composite
def _near_an_edge(draw: st.DrawFn) -> tuple[tuple[str, ...], str]:
    """Draw exceptions, and an address at or beside the edge of some network."""
    exceptions = tuple(draw(st.lists(st.sampled_from(EXCEPTIONS), max_size=4, unique=True)))
    network = draw(st.sampled_from([row[0] for row in _guard(*exceptions).refused()] + [*map(ip_network, EXCEPTIONS)]))
    edge = draw(st.sampled_from([int(network.network_address), int(network.broadcast_address)]))
    number = min(max(edge + draw(st.integers(-2, 2)), 0), 2**network.max_prefixlen - 1)
    return exceptions, str(type(network.network_address)(number))


@given(_near_an_edge())
def test_the_sets_refuse_what_the_guard_refuses(case: tuple[tuple[str, ...], str]) -> None:
    """For addresses around every edge and with any exceptions, filter and proxy say the same."""
    exceptions, text = case
    guard, address = _guard(*exceptions), ip_address(text)
    in_set = any(low <= int(address) <= high for low, high, _ in nft.refused_ranges(guard, address.version))
    mapped = address.version == 6 and address.ipv4_mapped is not None

    # A v4-mapped address never is on the wire (the kernel sends IPv4), so its whole range is refused.
    assert in_set == (mapped or guard.check(address) is not None)


@given(st.lists(st.sampled_from(EXCEPTIONS), max_size=5, unique=True))
def test_ranges_are_in_order_and_do_not_overlap(exceptions: list[str]) -> None:
    """Nft refuses overlapping elements, and the whole transaction with them."""
    for version in (4, 6):
        ranges = nft.refused_ranges(_guard(*exceptions), version)

        assert all(low <= high for low, high, _ in ranges)
        assert all(before[1] < after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize("network", ["64:ff9b::a01:0/112", "2002:a01::/32", "2001:0:1::/48", "::7f00:0/104"])
def test_what_embeds_ipv4_cannot_be_lifted(network: str) -> None:
    """An exception inside NAT64, 6to4, Teredo or IPv4-compatible addresses is refused: sets cannot judge the inside."""
    guard = _guard(network)

    assert nft.lifted_embedding(guard) == (ip_network(network),)
    with pytest.raises(ValueError, match="embeds IPv4"):
        nft.ruleset(guard, (), RESOLVER, SOURCES)


def test_a_comment_cannot_end_its_string() -> None:
    """A rule's text comes from a policy file; quotes and backslashes in it do not become nft."""
    [(network, rule)] = compile_ruleset(Egress(deny=("8.8.8.8",))).deny.networks()
    hostile = rule._replace(text='8.8.8.8" accept; flush ruleset \\ \n')
    text = nft.ruleset(_guard(), [(network, hostile)], RESOLVER, SOURCES)

    assert '"deny 8.8.8.8? accept; flush ruleset ? ?"' in text


def test_counters_are_read_and_summed_by_kind() -> None:
    """Elements with the same meaning are one line of the receipt; what was never hit is not in it."""
    named = [
        {"counter": {"name": name, "packets": number, "bytes": number * 100}}
        for number, name in enumerate(("dns", "public", "sent", "received", "unsolicited", "other"))
    ]
    elements = [
        {"elem": {"comment": comment, "counter": {"packets": packets}}}
        for comment, packets in (("private", 2), ("private", 3), ("multicast", 0))
    ]
    rule = {"rule": {"comment": "deny 8.8.8.8", "expr": [{"match": {}}, {"counter": {"packets": 7}}]}}
    text = json.dumps({"nftables": [{"metainfo": {}}, *named, {"set": {"elem": elements}}, rule]}).encode()

    assert nft.counts(text) == nft.Counts(
        connections=1, names=0, sent_bytes=200, received_bytes=300,
        refused={"private": 5, "deny 8.8.8.8": 7, "other protocols": 5},
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"nftables": []}', b'{"nftables": [{"counter": {"name": 1}}]}', b"\xff"]
)
def test_other_text_is_no_counters(text: bytes) -> None:
    """A cut or foreign answer is an error, never zeros."""
    with pytest.raises(ValueError, match="not the counters"):
        nft.counts(text)
