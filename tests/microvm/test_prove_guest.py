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
