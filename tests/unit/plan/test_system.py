"""Steps of an installation: each has its inverse, and undoing runs in an order that works."""

import msgspec
import pytest

from cloister.plan import system
from cloister.plan.system import (
    AnySystemStep,
    DisableUnit,
    EditLines,
    EnableUnit,
    InstallFile,
    LoadFirewall,
    MakeAccounts,
    MakeDirectory,
    MakeLink,
    ReloadManager,
    ReloadUnit,
    RemoveBridge,
    RemoveFile,
    RemoveTree,
    RestartUnit,
    StartUnit,
    StopUnit,
    SystemPlan,
    undo,
)
from cloister.plan.unit import Account

ACCOUNT = Account(name="cl-pi-alice", uid=1_900_000_000, agent="pi", user="alice")
STEPS: tuple[AnySystemStep, ...] = (
    InstallFile(path="/etc/a", text="new"),
    InstallFile(path="/etc/a", text="new", before="old", before_mode=0o600, before_uid=1, before_gid=2),
    RemoveFile(path="/etc/b", before="text", mode=0o640, gid=5),
    MakeDirectory(path="/var/c"),
    MakeDirectory(path="/var/c", mode=0o700, before=(0o755, 1, 2)),
    MakeLink(path="/run/d", target="usr/d"),
    MakeAccounts(accounts=(ACCOUNT,), daemons=("cloister-proxy",)),
    EditLines(path="/etc/cron.deny", add=("x",), remove=("y",)),
    LoadFirewall(text="table", before="old"),
    LoadFirewall(text="table"),
    EnableUnit(unit="a.socket"),
    StartUnit(unit="a.socket"),
    StopUnit(unit="b.service"),
    RestartUnit(unit="c.service"),
    ReloadUnit(unit="c.service"),
    ReloadManager(),
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_taking_back_what_was_taken_back_is_the_step_again(step: AnySystemStep) -> None:
    """No inverse forgets anything that the step said about the state before and after."""
    back = step.inverse()
    assert back is not None
    again = back.inverse()
    assert again is not None
    kept = {name: getattr(step, name) for name in step.__struct_fields__ if name != "why"}
    assert {name: getattr(again, name) for name in kept} == kept


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_steps_survive_the_record(step: AnySystemStep) -> None:
    """What is written before the first step is read again as what it was."""
    plan = SystemPlan(steps=(step,))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=SystemPlan) == plan
    assert "\n" not in step.describe()


def test_every_kind_of_step_is_tried_here() -> None:
    """The union and this file know the same steps, inverses included."""
    tried = {type(step) for step in STEPS} | {type(step.inverse()) for step in STEPS}
    kinds = {kind for kind in vars(system).values() if isinstance(kind, type) and issubclass(kind, system.SystemStep)}
    bases = {system.SystemStep, system.Owned, system.UnitStep}
    assert kinds - bases == tried | {RemoveTree, RemoveBridge}


def test_undoing_stops_first_and_starts_last() -> None:
    """A unit that was restarted comes up again from the old file, and a new one is gone before its file is."""
    done = (
        StopUnit(unit="gone.service"),
        DisableUnit(unit="gone.service"),
        InstallFile(path="/etc/systemd/system/new.service", text="new"),
        InstallFile(path="/etc/systemd/system/old.service", text="2", before="1"),
        ReloadManager(),
        EnableUnit(unit="new.service"),
        StartUnit(unit="new.service"),
        RestartUnit(unit="old.service"),
    )
    assert [step.describe() for step in undo(done)] == [
        "stop new.service",
        "disable new.service",
        "change /etc/systemd/system/old.service (root, 0644)",
        "remove /etc/systemd/system/new.service",
        "have systemd read its unit files again",
        "restart old.service",
        "enable gone.service",
        "start gone.service",
    ]


def test_what_cannot_be_taken_back_is_not_pretended_to_be() -> None:
    """Deleted data and ended runs stay so."""
    assert undo((RemoveTree(path="/x"), StopUnit(unit="cloister-run-1.service", transient=True))) == ()
