"""The table of accounts: its text, who is in it, and its counters read back."""

import itertools
import json
import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.egress import nft_units
from cloister.egress.addresses import Guard, parse_network
from cloister.egress.nft_units import AccountRules, Passed
from cloister.egress.rules import compile_ruleset
from cloister.plan.unit import FIRST_UID, UID_COUNT
from cloister.policy.model import Egress

GOLDEN = Path(__file__).parents[2] / "golden/units.nft"
NAS = Guard(exceptions=(ip_network("192.168.1.20/32"), ip_network("127.0.0.0/8")))
DENIED = compile_ruleset(Egress(deny=("8.8.8.8", "[2001:4860::/32]:53"))).deny.networks()
ACCOUNTS = (
    AccountRules("cl-pi-alice", FIRST_UID),
    AccountRules("cl-web-alice", FIRST_UID + 1, Guard()),
    AccountRules("cl-web-bob", FIRST_UID + 2, Guard()),
    AccountRules(
        "cl-nas-bob", FIRST_UID + 3, NAS, DENIED,
        (parse_network("198.51.100.0/24"), parse_network("2a00::/16")), ("tcp dport 25 counter reject",),
    ),
    AccountRules("cl-shut-bob", FIRST_UID + 4, block=(parse_network("1.1.1.1"),), statements=("udp dport 53 counter",)),
)  # fmt: skip


def _chains(text: str) -> dict[str, list[str]]:
    """Return the lines of each chain."""
    found = re.findall(r"\tchain (\w+) \{\n(.*?)\n\t\}", text, re.DOTALL)
    return {name: [line.strip() for line in body.splitlines()] for name, body in found}


def test_the_text_is_as_reviewed() -> None:
    """Every change of the table shows in a diff of the golden file; rewrite that only after reading it."""
    assert nft_units.ruleset(ACCOUNTS) == GOLDEN.read_text()


def test_one_transaction_takes_the_place_of_the_old_table() -> None:
    """The text speaks of one table and makes it anew: half of it is never loaded, nobody else's is touched."""
    text = nft_units.ruleset(ACCOUNTS)

    assert text.startswith("table inet cloister {}\ndelete table inet cloister\ntable inet cloister {\n")
    assert re.findall(r"^\S.*", text, re.MULTILINE)[3:] == ["}"]
    assert "flush" not in text


def test_every_way_through_the_table_ends_in_a_verdict() -> None:
    """Whoever is in it meets `refuse` or `accept`; a chain that just ended would fall through to the policy."""
    chains = _chains(nft_units.ruleset(ACCOUNTS))
    last = {name: lines[-1] for name, lines in chains.items()}

    assert last.pop("refuse") == "drop"
    assert last.pop("pass") == "accept"
    assert (
        last.pop("output")
        == f'meta skuid {FIRST_UID}-{FIRST_UID + UID_COUNT - 1} counter name "refused_others" goto refuse'
    )
    assert all(re.fullmatch(r"goto (refuse|pass|closed|internet\d+)", line) for line in last.values())
    assert [name for name, lines in chains.items() if "accept" in lines] == ["pass"]


def test_others_are_only_looked_up() -> None:
    """BF5: the hook's own rules match uids of ours and nothing else; whoever is not ours meets the policy, accept."""
    output = _chains(nft_units.ruleset(ACCOUNTS))["output"]

    assert output[0] == "type filter hook output priority filter; policy accept;"
    assert all(line.startswith("meta skuid ") and "!=" not in line for line in output[1:])


def test_statements_stand_in_their_accounts_own_chain() -> None:
    """BF5: what an owner adds for one agent is reached by its uid alone."""
    text = nft_units.ruleset(ACCOUNTS)
    holding = [name for name, lines in _chains(text).items() if "tcp dport 25 counter reject" in lines]

    assert holding == [f"own_{FIRST_UID + 3}"]
    assert re.findall(r"(\d+) : goto own_(\d+)", text) == [(str(FIRST_UID + at), str(FIRST_UID + at)) for at in (3, 4)]


def test_accounts_with_the_same_guard_share_its_sets() -> None:
    """A thousand agents in mode `internet` make one pair of sets, so that loading them stays quick."""
    text = nft_units.ruleset(AccountRules(f"a{number}", FIRST_UID + number, Guard()) for number in range(1000))

    assert len(re.findall(r"\tset ", text)) == 2
    assert len(text) < 400_000


def test_the_order_of_accounts_does_not_matter() -> None:
    """The same policy gives the same text, so that `cloister apply` has nothing to do the second time."""
    mixed = list(ACCOUNTS)
    mixed.reverse()

    assert nft_units.ruleset(mixed) == nft_units.ruleset(ACCOUNTS)


def test_without_accounts_the_range_is_closed() -> None:
    """An account that was made a moment ago, and that no table knows, is refused all the same."""
    text = nft_units.ruleset(())

    assert f"meta skuid {FIRST_UID}-{FIRST_UID + UID_COUNT - 1}" in text


@given(st.sampled_from([row[0] for row in Guard().refused()]), st.booleans(), st.integers(-2, 2))
def test_the_sets_are_the_guards(network: nft_units.Network, high: bool, off: int) -> None:
    """B4, B5, BF7: what the relay's guard refuses stands in the sets, and nothing else, at every edge."""
    sets = {4: [], 6: []}
    for version in (4, 6):
        kind = {4: IPv4Address, 6: IPv6Address}[version]
        elements = re.search(
            rf"set refused{version}_0 .*?elements = \{{(.*?)\}}", nft_units.ruleset(ACCOUNTS[1:2]), re.DOTALL
        )
        assert elements
        for word in elements[1].replace(",", " ").split():
            first, _, last = word.partition("-")
            one = ip_network(first)
            sets[version].append((int(one[0]), int(kind(last)) if last else int(one[-1])))
    number = int(network[-1] if high else network[0]) + off
    if not 0 <= number < 2**network.max_prefixlen:
        return
    address = type(network[0])(number)
    mapped = address.version == 6 and address.ipv4_mapped is not None  # never on the wire: the kernel sends IPv4

    inside = any(first <= number <= last for first, last in sets[address.version])
    assert inside == (mapped or Guard().check(ip_address(str(address))) is not None)


def test_only_single_addresses_and_loopback_lead_to_the_host() -> None:
    """An exception as wide as a private network does not open the host's own address in it, as the relay has it."""
    guard = Guard(
        exceptions=tuple(map(ip_network, ("10.0.0.0/8", "127.0.0.0/8", "192.168.1.1/32", "fd00::/64", "fd01::1/128")))
    )
    chain = _chains(nft_units.ruleset([AccountRules("a", FIRST_UID, guard)]))["internet0"]
    before = list(itertools.takewhile(lambda line: not line.startswith("fib"), chain))

    assert [line for line in before if line.endswith("goto pass")] == [
        "ip daddr 127.0.0.0/8 goto pass", "ip daddr 192.168.1.1/32 goto pass", "ip6 daddr fd01::1/128 goto pass",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accounts", "why"),
    [
        ([AccountRules("root", 0)], "not a uid of ours"),
        ([AccountRules("alice", 1000)], "not a uid of ours"),
        ([AccountRules("late", FIRST_UID + UID_COUNT)], "not a uid of ours"),
        ([AccountRules("a", FIRST_UID), AccountRules("b", FIRST_UID)], "another account"),
        ([AccountRules("a", FIRST_UID, statements=("accept",))], "only refuse or count"),
        ([AccountRules("a", FIRST_UID, Guard(exceptions=(ip_network("2002:a00::/24"),)))], "embeds IPv4"),
    ],
)  # fmt: skip
def test_what_the_table_cannot_mean_is_no_text(accounts: list[AccountRules], why: str) -> None:
    """Other people's uids, twins, and what sets cannot judge are refused before nft sees anything."""
    with pytest.raises(ValueError, match=why):
        nft_units.ruleset(accounts)


def test_a_name_cannot_end_its_comment() -> None:
    """An account's name is quoted, whatever is in it."""
    text = nft_units.ruleset([AccountRules('x" } flush ruleset', FIRST_UID)])

    assert 'comment "x? } flush ruleset"' in text


def test_counters_are_read_by_uid() -> None:
    """Status shows what passed and what was refused for each account; counters of others are none of it."""
    counters = [
        {"counter": {"name": name, "packets": packets, "bytes": packets * 60}}
        for name, packets in (
            (f"sent_{FIRST_UID}", 7),
            (f"refused_{FIRST_UID}", 2),
            (f"refused_{FIRST_UID + 1}", 5),
            ("refused_others", 1),
        )
    ]
    text = json.dumps({"nftables": [{"metainfo": {}}, *counters]}).encode()

    assert nft_units.passed(text) == {FIRST_UID: Passed(7, 420, 2), FIRST_UID + 1: Passed(0, 0, 5)}


@pytest.mark.parametrize("text", [b"", b"[]", b'{"nftables": [{"counter": {"name": "sent_1900000000"}}]}', b"\xff"])
def test_other_text_is_no_counters(text: bytes) -> None:
    """A cut or foreign answer is an error, never zeros."""
    with pytest.raises(ValueError, match="not the counters"):
        nft_units.passed(text)


def test_the_hosts_resolvers_answer_names_and_nothing_else() -> None:
    """An account in mode `internet` reaches port 53 over UDP of those; a closed one does not."""
    accounts = [
        nft_units.AccountRules("cl-web-alice", FIRST_UID, Guard()),
        nft_units.AccountRules("cl-pi-alice", FIRST_UID + 1),
        nft_units.AccountRules("cl-own-alice", FIRST_UID + 2, Guard(), block=(ip_network("127.0.0.0/8"),)),
    ]
    resolvers = (ip_address("fd00::53"), ip_address("127.0.0.53"), ip_address("127.0.0.53"))
    text = nft_units.ruleset(accounts, resolvers)
    chain = text[text.index("chain internet0") :].splitlines()

    assert chain[1:3] == [
        "\t\tip daddr 127.0.0.53 udp dport 53 goto pass",
        "\t\tip6 daddr fd00::53 udp dport 53 goto pass",
    ]
    assert text.count(" udp dport 53 goto pass") == 2
    assert f"{FIRST_UID + 1} : goto closed" in text
    own = text[text.index(f"chain own_{FIRST_UID + 2}") :].splitlines()
    assert own[1:3] == ["\t\tip daddr 127.0.0.0/8 counter goto refuse", "\t\tgoto internet0"]
