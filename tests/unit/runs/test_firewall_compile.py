"""From the policy's agents and the recorded accounts to the table."""

from ipaddress import ip_network

import pytest

from cloister.errors import PolicyError
from cloister.plan.unit import FIRST_UID, Account
from cloister.policy.model import Agent, Egress, Unit
from cloister.runs.firewall_compile import compile_firewall, direct_rules


def _account(number: int, agent: str) -> Account:
    return Account(name=f"cl-{agent}-alice", uid=FIRST_UID + number, agent=agent, user="alice")


def _agent(mode: str = "deny", unit: Unit | None = None, **egress: object) -> Agent:
    return Agent(isolation="unit", egress=Egress(mode=mode, **egress), unit=unit or Unit())


def test_only_mode_internet_passes_anything() -> None:
    """`deny`, `ask` and `learn` are the proxy's: the packet filter refuses those accounts everything."""
    agents = {mode: _agent(mode) for mode in ("deny", "ask", "learn", "internet")}
    text = compile_firewall([_account(number, name) for number, name in enumerate(agents)], agents)

    assert [line.strip().rstrip(",") for line in text.splitlines() if " : goto " in line] == [
        f"{FIRST_UID} : goto closed", f"{FIRST_UID + 1} : goto closed", f"{FIRST_UID + 2} : goto closed",
        f"{FIRST_UID + 3} : goto internet0",
    ]  # fmt: skip


def test_accounts_that_nobody_uses_any_more_are_closed() -> None:
    """An agent that left the policy, or is no unit any more, may have files and processes; it has no network."""
    agents = {"web": Agent(isolation="namespace", egress=Egress(mode="internet"))}
    text = compile_firewall([_account(0, "gone"), _account(1, "web")], agents)

    assert text.count(" : goto closed") == 2


def test_the_policys_addresses_are_in_the_accounts_rules() -> None:
    """Denied addresses, blocked networks and statements refuse; an exception is taken out of the refused sets."""
    unit = Unit(block=("198.51.100.0/24",), firewall=("tcp dport 25 counter reject",))
    agents = {"web": _agent("internet", unit, deny=("8.8.8.8",), private=("192.168.1.20/32",))}
    text = compile_firewall([_account(0, "web")], agents, (ip_network("93.184.216.0/24"),))

    assert "ip daddr 198.51.100.0/24 counter goto refuse" in text
    assert 'ip daddr 8.8.8.8/32 counter goto refuse comment "deny 8.8.8.8"' in text
    assert "tcp dport 25 counter reject" in text
    assert "192.168.0.0-192.168.1.19" in text
    assert "93.184.216.0/24" in text


def test_all_mistakes_are_named_with_their_place() -> None:
    """A wrong network, a statement that opens something, and an exception no set can judge: one error, three lines."""
    unit = Unit(block=("10.0.0.1/8",), firewall=("tcp dport 1 accept",))
    agents = {"web": _agent("internet", unit, private=("64:ff9b::a00:1/128",))}
    with pytest.raises(PolicyError) as caught:
        compile_firewall([_account(0, "web")], agents)

    assert [problem.where for problem in caught.value.problems] == [
        ".agents.web.unit.block[0]", ".agents.web.unit.firewall[0]", ".agents.web.egress.private",
    ]  # fmt: skip


def test_rules_that_differ_are_seen() -> None:
    """A profile or project that changes what the packet filter would have to know differs from its account's rules."""
    base = _agent("internet", private=("10.0.0.5/32",))

    assert direct_rules(base) == direct_rules(_agent("internet", private=("10.0.0.5/32",), allow=("example.org",)))
    assert direct_rules(base) != direct_rules(_agent("internet"))
    assert direct_rules(base) != direct_rules(_agent("internet", private=("10.0.0.5/32",), deny=("8.8.8.8",)))
    assert direct_rules(_agent("deny", private=("10.0.0.5/32",))) == direct_rules(_agent("ask"))
