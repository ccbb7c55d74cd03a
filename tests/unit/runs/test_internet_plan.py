"""Mode `internet`, decided: what it needs of the host, which rules it cannot keep, and what pasta is told."""

import msgspec
import pytest

from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import PolicyError, UnsupportedError
from cloister.plan.facts import HostFacts, Program
from cloister.policy.model import Egress, EgressRule
from cloister.runs.internet import Internet, internet

HOST = HostFacts(
    kernel="6.12",
    arch="x86_64",
    uid=1000,
    pasta=Program(path="/usr/bin/pasta"),
    nft=Program(path="/usr/sbin/nft"),
    tun=True,
)


def decide(egress: Egress, host: HostFacts = HOST, resolvers: tuple[str, ...] = ("9.9.9.9",)) -> Internet:
    """Decide for a table of the policy."""
    return internet(compile_ruleset(egress, agent="a"), compile_guard(egress, agent="a"), host, resolvers)


@pytest.mark.parametrize(
    ("lacking", "word"),
    [
        ({"pasta": Program()}, "pasta"),
        ({"nft": Program(refused="/home/u/bin/nft")}, "/home/u/bin/nft"),
        ({"tun": False}, "tun"),
    ],
)
def test_what_the_host_lacks_is_named_with_a_remedy(lacking: dict[str, object], word: str) -> None:
    """Without pasta, nft or the tap device nothing is started, and there is something to type."""
    with pytest.raises(UnsupportedError, match=word) as caught:
        decide(Egress(), msgspec.structs.replace(HOST, **lacking))

    assert caught.value.remedy


@pytest.mark.parametrize(
    "egress",
    [
        Egress(deny=("evil.example",)),
        Egress(deny=("*.evil.example:443",)),
        Egress(allow=(EgressRule(host="api.example", methods=("GET",)),)),
        Egress(allow=(EgressRule(host="9.9.9.9", paths=("/a",)),)),
        Egress(private=("64:ff9b::a01:203/128",)),
    ],
)
def test_rules_that_direct_connections_walk_around_are_refused(egress: Egress) -> None:
    """A denied name, a limit on methods or paths, an exception for NAT64: not kept, so not accepted."""
    with pytest.raises(PolicyError) as caught:
        decide(egress)

    assert caught.value.reference == "egress-not-enforceable"
    assert all(problem.where and problem.remedy for problem in caught.value.problems)


def test_rules_that_hold_are_taken() -> None:
    """Denied addresses, private exceptions and plainly allowed names go with the mode."""
    decided = decide(Egress(deny=("8.8.8.8",), private=("192.168.1.20/32",), allow=("api.example",)))

    assert "ip daddr 8.8.8.8/32 counter goto refuse" in decided.ruleset
    assert "192.168.1.21-192.168.255.255" in decided.ruleset


def test_the_self_probe_tries_only_what_is_refused() -> None:
    """An address that the policy opens is no proof; at least one that is never opened stays."""
    assert "10.255.255.1:9" in decide(Egress()).probes
    assert "10.255.255.1:9" not in decide(Egress(private=("10.0.0.0/8",))).probes
    assert len(decide(Egress(private=("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))).probes) >= 2


def test_pasta_opens_nothing_and_shows_nothing() -> None:
    """No port is forwarded, no address means the host's loopback, and the addresses inside are made up."""
    words = decide(Egress()).pasta

    for option in ("-t", "-u", "-T", "-U"):
        assert words[words.index(option) + 1] == "none"
    assert {"--no-map-gw", "--no-dhcp", "--no-dhcpv6", "--no-ra", "-f"} <= set(words)
    assert [words[index + 1] for index, word in enumerate(words) if word in ("-a", "-g")] == [
        "192.0.2.2", "192.0.2.1", "2001:db8::2", "2001:db8::1",
    ]  # fmt: skip
    assert "--runas" not in words
    assert "--runas" in decide(Egress(), msgspec.structs.replace(HOST, uid=0)).pasta


@pytest.mark.parametrize(
    ("resolvers", "expected"),
    [
        (("9.9.9.9",), "192.0.2.53"),
        (("::1", "127.0.0.53"), "192.0.2.53"),
        (("2620:fe::fe",), "2001:db8::53"),
        ((), "192.0.2.53"),
    ],
)
def test_the_resolver_has_the_version_of_the_hosts(resolvers: tuple[str, ...], expected: str) -> None:
    """Pasta translates within one version of IP; without any resolver the plan says so."""
    decided = decide(Egress(), resolvers=resolvers)

    assert decided.resolver == expected
    assert bool(decided.notices) == (not resolvers)
