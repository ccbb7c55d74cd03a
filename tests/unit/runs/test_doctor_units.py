"""The doctor about units: what is missing is named with a line to type, and where all is there nothing is asked for."""

import msgspec
import pytest

from cloister.plan.facts import HostFacts, Program
from cloister.plan.system_facts import UnitFacts
from cloister.runs.doctor import judge
from cloister.runs.doctor_units import judge_units

GOOD = UnitFacts(
    systemd_booted=True, cgroup_layout="unified", kernel="6.12.9", idmapped=True, nft="/usr/sbin/nft",
    firewall_loaded=True, hostd_there=True, hostd_answers="yes",
)  # fmt: skip


def test_a_good_host_needs_nothing() -> None:
    """All findings are well, and none has a remedy."""
    assert {(one.state, one.remedy) for one in judge_units(GOOD)} == {("ok", "")}


@pytest.mark.parametrize(
    ("change", "name", "state"),
    [
        ({"cgroup_layout": "legacy"}, "unit-addresses", "degraded"),
        ({"idmapped": False, "kernel": "5.10.0"}, "idmapped-mounts", "degraded"),
        ({"nft": ""}, "unit-firewall", "missing"),
        ({"firewall_loaded": False}, "unit-firewall", "degraded"),
        ({"hostd_there": False}, "hostd", "missing"),
        ({"hostd_answers": "no"}, "hostd", "missing"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(change: dict[str, object], name: str, state: str) -> None:
    """Exactly that finding changes, and says what to type."""
    found = {one.name: one for one in judge_units(msgspec.structs.replace(GOOD, **change))}
    assert found[name].state == state
    assert found[name].remedy
    assert all(one.state == "ok" for one in found.values() if one.name != name)


def test_without_systemd_one_line_is_enough() -> None:
    """Nobody needs to hear five times that there is no systemd."""
    assert judge_units(msgspec.structs.replace(GOOD, systemd_booted=False)) == ()


@pytest.mark.parametrize(("version", "state"), [("251.4-1", "missing"), ("252.38-1~deb12u1", "ok"), ("", "ok")])
def test_an_old_systemd_is_not_enough(version: str, state: str) -> None:
    """252 is the first that has every property that units need; a version that nobody asked for is no reason."""
    facts = HostFacts(kernel="6.1", arch="x86_64", uid=1, systemd_booted=True, systemd=Program(version=version))
    assert next(one for one in judge(facts) if one.name == "systemd").state == state
