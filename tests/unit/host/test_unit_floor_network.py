"""The floor under the unit that connects a run in mode `internet`: what the compiler makes is above, no more."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloister.errors import StepError
from cloister.host import unit_floor
from cloister.plan.steps import Plan
from cloister.plan.unit import Account, Grant, UnitLaunch

PLANS = Path(__file__).parents[2] / "golden/unit_plans"
PLAN = msgspec.json.decode((PLANS / "internet.257.json").read_bytes(), type=Plan)
SHIM = "/opt/cloister/bin/cloister"


@pytest.fixture(autouse=True)
def roots_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file of the host be root's, so that only the rules on words are tried here."""
    monkeypatch.setattr(unit_floor.os, "lstat", lambda _: ROOTS)


class ROOTS:
    """What lstat(2) says of a directory of root's."""

    st_uid = 0
    st_mode = 0o040755


def unit() -> UnitLaunch:
    """Return the unit of the golden plan."""
    assert PLAN.launch.unit
    return PLAN.launch.unit


def check(plan: Plan = PLAN, *, network: bool = True, filtered: bool = True) -> None:
    """Hold a plan against the floor."""
    account = Account(name=unit().account, uid=unit().uid, agent=PLAN.agent, user="alice")
    grant = Grant(user="alice", agent=PLAN.agent, account=account.name, roots=("~",), network=network)
    unit_floor.check_plan(plan, unit_floor.Bounds(grant, account, unit().workspace, (SHIM,), lambda _: filtered))


def with_launch(**changes: object) -> Plan:
    """Return the golden plan with another launch."""
    return msgspec.structs.replace(PLAN, steps=(*PLAN.steps[:-1], msgspec.structs.replace(PLAN.launch, **changes)))


def with_network(**changes: object) -> Plan:
    """Return the golden plan with another unit of the network."""
    assert unit().network
    network = msgspec.structs.replace(unit().network, **changes)
    return with_launch(unit=msgspec.structs.replace(unit(), network=network))


def with_property(name: str, value: str | None) -> Plan:
    """Return the golden plan with one property of the network's unit replaced; None leaves it out."""
    assert unit().network
    kept = tuple(one for one in unit().network.properties if one[0] != name)
    return with_network(properties=kept if value is None else (*kept, (name, value)))


def test_the_compilers_network_is_above() -> None:
    """With the grant's word and the packet filter in place."""
    check()


def test_nothing_is_connected_without_grant_or_packet_filter() -> None:
    """The broker, were it an attacker's, connects nobody whom the owner has not; nor does anything start unfiltered."""
    with pytest.raises(StepError, match="no internet"):
        check(network=False)
    with pytest.raises(StepError, match="packet filter"):
        check(filtered=False)


def test_without_a_network_of_its_own_a_unit_reaches_no_address() -> None:
    """Neither a lost unit nor pasta without one goes through; nor does the agent's own unit lose its namespace."""
    with pytest.raises(StepError, match="no unit to run in"):
        check(with_launch(unit=msgspec.structs.replace(unit(), network=None)))
    alone = msgspec.structs.replace(unit(), network=None)
    with pytest.raises(StepError) as lacking:
        check(with_launch(unit=alone, pasta=(), ruleset="", nft=""))
    assert lacking.value.where == "IPAddressDeny=any"
    kept = tuple(one for one in unit().properties if one[0] != "PrivateNetwork")
    with pytest.raises(StepError, match="lacks a property"):
        check(with_launch(unit=msgspec.structs.replace(unit(), properties=kept)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("User", "root"), ("User", None), ("Group", "disk"), ("BindsTo", None), ("BindsTo", "ssh.service"),
        ("After", None), ("IPAddressDeny", None), ("IPAddressDeny", ""), ("IPAddressAllow", "any"),
        ("NoNewPrivileges", "no"), ("CapabilityBoundingSet", "CAP_NET_ADMIN"), ("AmbientCapabilities", "CAP_NET_RAW"),
        ("DeviceAllow", "/dev/sda rw"), ("DevicePolicy", "auto"), ("BindPaths", "/dev"), ("BindPaths", "/home"),
        ("PrivateDevices", "no"), ("PrivateUsers", "no"), ("RootDirectory", "/"), ("RootDirectory", None),
        ("BindReadOnlyPaths", "/home"), ("BindReadOnlyPaths", "/run"), ("BindReadOnlyPaths", "/etc/shadow:/etc/x"),
        ("InaccessiblePaths", None), ("RestrictNamespaces", "no"), ("RestrictNamespaces", "user net mnt cgroup"),
        ("RestrictAddressFamilies", "AF_PACKET"), ("SystemCallFilter", None), ("SystemCallFilter", "@system-service"),
        ("MemoryMax", "infinity"), ("TasksMax", "infinity"), ("LimitCORE", "infinity"), ("Slice", "system.slice"),
        ("ExecStartPre", "/bin/sh"), ("ExecStopPost", "+/bin/sh"), ("Environment", "LD_PRELOAD=/x"),
        ("NetworkNamespacePath", "/proc/1/ns/net"), ("PrivateNetwork", "yes"), ("Delegate", "yes"),
        ("KillMode", "none"), ("Type", "forking"), ("StandardOutput", "file:/etc/passwd"), ("UMask", "0000"),
    ],
)  # fmt: skip
def test_no_worse_property(name: str, value: str | None) -> None:
    """A property of another value, one that is missing, and one that is not in the table: each is refused."""
    with pytest.raises(StepError) as refused:
        check(with_property(name, value))
    assert refused.value.reference == "below-the-floor"


def test_a_property_stands_once() -> None:
    """The last of two would win."""
    assert unit().network
    twice = (*unit().network.properties, ("User", unit().account))
    with pytest.raises(StepError, match="stands twice"):
        check(with_network(properties=twice))


@pytest.mark.parametrize(
    "words",
    [
        ("--map-gw",), ("--map-host-loopback", "192.0.2.1"), ("-t", "all"), ("-u", "53"), ("-T", "auto"),
        ("-U", "auto"), ("--runas", "0"), ("-F", "3"), ("--pcap", "/x"), ("-l", "/var/log/x"), ("--mtu", "9"),
        ("-o", "1.2.3.4"), ("--netns-only",), ("--userns", "/proc/1/ns/user"), ("--netns", "/proc/1/ns/net"),
        ("--socket", "/x"), ("-I", "../x"), ("-a", "-x"), ("-a",), ("sh", "-c", "id"), ("--",), ("-P", "/x"),
    ],
)  # fmt: skip
def test_pasta_is_told_nothing_else(words: tuple[str, ...]) -> None:
    """No further option or word: ports, mappings to the host's loopback, files, other namespaces, a command."""
    with pytest.raises(StepError) as refused:
        check(with_launch(pasta=(*PLAN.launch.pasta, *words)))
    assert refused.value.reference == "below-the-floor"


@pytest.mark.parametrize("option", ["--no-map-gw", "-f", "--config-net", "--no-ra"])
def test_pasta_is_told_everything(option: str) -> None:
    """Each option that closes something, and those that keep it in the unit, must stand."""
    with pytest.raises(StepError, match="pasta is not told to"):
        check(with_launch(pasta=tuple(word for word in PLAN.launch.pasta if word != option)))
    with pytest.raises(StepError):
        check(with_launch(pasta=("/usr/bin/pasta",)))


def test_programs_are_roots_and_the_shim_is_ours() -> None:
    """What others could change is not started as the account either, and the namespace has a filter inside."""
    for changes in ({"pasta": ("/home/alice/pasta", *PLAN.launch.pasta[1:])}, {"nft": "/home/alice/nft"}):
        with pytest.raises(StepError):
            check(with_launch(**changes))
    for argv in (("/bin/sh",), ("/.cloister/cloister-shim", "network", "x"), ()):
        with pytest.raises(StepError, match="not our shim"):
            check(with_network(argv=argv))
    with pytest.raises(StepError, match="filter of its own"):
        check(with_launch(ruleset=""))
    with pytest.raises(StepError, match="not the run's"):
        check(with_network(unit="ssh.service"))
