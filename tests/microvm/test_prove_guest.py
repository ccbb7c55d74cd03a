"""The battery of `cloister prove` against an agent in a guest: attacks on the guest itself, and all the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.prove.battery import for_guests
from cloister.prove.case import load
from microvm.conftest import GuestImage
from support.cloister import User

CASES = load()
OF_GUESTS = sorted(name for name, case in CASES.items() if "microvm" in case.if_policy)
SAMPLE = (
    "fs-home-canary", "fs-host-runtime", "fs-kernel-views", "fs-other-homes", "fs-rename-parent", "fs-setuid-programs",
    "ipc-broker", "kernel-modules", "kernel-ptrace", "net-direct-tcp", "proc-identity-leaks", "proxy-private",
)  # fmt: skip
"""One of each kind that a guest answers in a way of its own; they share one run."""
LIMITS = {"limits-memory", "limits-disk", "limits-tasks"}
"""They need limits in the policy, which this one has not."""
POLICY = """\
schema = 1
[agents.shell]
preset = "shell"
isolation = "microvm"
environment_audit = false
[agents.shell.microvm]
image = "test"
memory = "256M"
warm = false
"""


@pytest.fixture
def user(home: Path, image: GuestImage) -> Iterator[User]:
    """A user whose shell runs in a guest."""
    user = User(home, POLICY)
    image.install(home)
    yield user
    user.close()


def proved(user: User, cwd: Path, names: tuple[str, ...], timeout_s: float) -> dict[str, dict[str, Any]]:
    """Try these cases; return what came of each."""
    chosen = [word for name in names for word in ("--case", name)]
    done = user.run("prove", "--json", *chosen, "shell", cwd=cwd, timeout_s=timeout_s)
    assert done.stdout.startswith("{"), done.stderr
    return {case["id"]: case for case in json.loads(done.stdout)["cases"]}


def not_denied(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the cases that were not denied, with what was said of them."""
    return {name: f"{case['outcome']}: {case['detail']}" for name, case in found.items() if case["outcome"] != "denied"}


@pytest.mark.timeout(420)
def test_attacks_on_the_guest_itself(user: User, workspace: Path) -> None:
    """Root, disks, kernel and channel of a guest withstand its agent, and so does what others attack elsewhere."""
    found = proved(user, workspace, (*OF_GUESTS, *SAMPLE), 400)

    assert len(OF_GUESTS) >= 4
    assert set(found) == {*OF_GUESTS, *SAMPLE}
    assert not_denied(found) == {}


def cover() -> tuple[str, ...]:
    """Return few cases that are of every class: those that share a run first, and of these the ones of most classes."""
    tried = [case for case in for_guests(list(CASES.values())) if case.id not in LIMITS]
    tried = [case for case in tried if not case.if_policy or case.id in OF_GUESTS]
    open_classes = {number for case in tried for number in case.classes}
    chosen = []
    while open_classes:
        gains = {case.id: len(open_classes.intersection(case.classes)) for case in tried}
        best = max(tried, key=lambda case: (gains[case.id] > 0, not case.alone, gains[case.id], case.shape == "any"))
        chosen.append(best.id)
        open_classes -= set(best.classes)
    return tuple(chosen)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_class_of_attack_is_tried_in_a_guest(user: User, workspace: Path) -> None:
    """One case at least of each class that a guest's agent can try, in few runs: all of them are denied."""
    chosen = cover()
    found = proved(user, workspace, chosen, 850)

    assert {number for name in chosen for number in CASES[name].classes} >= {*range(1, 14), *range(15, 24)}
    assert len(chosen) < len(CASES) / 3
    assert set(found) == set(chosen)
    assert not_denied(found) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_battery_in_a_guest(user: User, workspace: Path) -> None:
    """Every case is denied, but for those whose thing the policy does not have."""
    found = proved(user, workspace, (), 1700)
    absent = {name for name, case in found.items() if case["outcome"] == "not-in-policy"}

    assert absent <= {name for name, case in CASES.items() if case.if_policy and name not in OF_GUESTS}
    assert set(not_denied(found)) - absent <= LIMITS


def test_consequences_are_looked_for_after_the_end() -> None:
    """A guest's changes come back at its end, so each case with consequences gets a run that ends before them."""
    cases = for_guests(list(CASES.values()))

    assert any(case.checks for case in cases)
    assert all(case.alone for case in cases if case.checks)
    assert any(not case.alone for case in cases)
