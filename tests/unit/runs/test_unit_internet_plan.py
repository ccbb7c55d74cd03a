"""Mode `internet` of a run under systemd, decided: narrower than its account is kept, wider is refused."""

import msgspec
import pytest

from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import CloisterError
from cloister.plan.facts import HostFacts, Program
from cloister.policy.model import Agent, Egress, Unit
from cloister.runs.unit_internet import UnitInternet, unit_internet

HOST = HostFacts(
    kernel="6.12", arch="x86_64", uid=0, pasta=Program(path="/usr/bin/pasta"), nft=Program(path="/usr/sbin/nft")
)


def agent(mode: str = "internet", unit: Unit | None = None, **egress: object) -> Agent:
    """Return an agent in a unit."""
    return Agent(isolation="unit", egress=Egress(mode=mode, **egress), unit=unit or Unit())


def decide(run: Agent, account: Agent | None = None, host: HostFacts = HOST) -> UnitInternet:
    """Decide for a run, and the agent as the packet filter knows it."""
    rules, guard = compile_ruleset(run.egress, agent="a"), compile_guard(run.egress, agent="a")
    return unit_internet((run, account or run), rules, guard, host, ("127.0.0.53",))


def test_a_narrower_run_is_kept_by_its_own_filter() -> None:
    """More denied, or fewer networks opened, than the account has: the filter inside says so."""
    account = agent(private=("192.168.77.0/24",))
    run = agent(private=("192.168.77.9/32",), deny=("93.184.216.34",))

    decided = decide(run, account)

    assert "93.184.216.34/32 counter goto refuse" in decided.internet.ruleset
    assert "192.168.77.9/32" in decided.outside.allow


@pytest.mark.parametrize(
    ("run", "account", "key"),
    [
        (agent(), agent("deny"), "egress.mode"),
        (agent(private=("10.0.0.0/8",)), agent(), "egress.private"),
        (agent(), agent(deny=("9.9.9.9",)), "egress.deny"),
        (agent(unit=Unit(block=("9.9.9.0/24",))), agent(), "unit.block"),
        (agent(), agent(unit=Unit(firewall=("tcp dport 22 drop",))), "unit.firewall"),
    ],
)
def test_a_wider_run_is_refused(run: Agent, account: Agent, key: str) -> None:
    """The filter of accounts knows no profile, so what it would refuse, or not know of, is said before the start."""
    with pytest.raises(CloisterError) as refused:
        decide(run, account)

    assert refused.value.reference == "unit-internet"
    assert refused.value.where.endswith(key)
    assert refused.value.remedy


def test_what_the_owner_adds_holds_inside_as_well() -> None:
    """`block` and `firewall` stand in the filter of the namespace: refused at once, whatever pasta makes of it."""
    decided = decide(agent(unit=Unit(block=("203.0.114.0/24",), firewall=("tcp dport 22 counter reject",))))

    assert "\t\ttcp dport 22 counter reject\n" in decided.internet.ruleset
    assert "ip daddr 203.0.114.0/24 counter goto refuse" in decided.internet.ruleset


def test_systemds_list_is_the_guards() -> None:
    """The third layer refuses pasta what the guard refuses, but for the host's resolver and what the policy opens."""
    decided = decide(agent(private=("192.168.77.9/32",)))

    assert {"10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "2002::/16"} <= set(decided.outside.deny)
    assert {"127.0.0.53", "192.168.77.9/32"} <= set(decided.outside.allow)
    assert not any(one.startswith(("10.", "169.254.")) for one in decided.outside.allow)


def test_a_host_without_pasta_is_refused_with_a_remedy() -> None:
    """The account's tap device is root's to look at; programs are looked for here."""
    with pytest.raises(CloisterError, match="pasta") as refused:
        decide(agent(), host=msgspec.structs.replace(HOST, pasta=Program()))
    assert refused.value.remedy
    assert decide(agent()).internet.pasta[0] == "/usr/bin/pasta"
    assert "--runas" not in decide(agent()).internet.pasta
