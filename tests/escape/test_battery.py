"""Every case of the battery, against the sandbox of a plain agent: denied, and its legitimate neighbour works."""

import json
from typing import Any

import pytest

from cloister.prove.case import load
from support.cloister import User

pytestmark = pytest.mark.kernel

CASES = load()
LIMITS = {"limits-memory", "limits-disk", "limits-tasks"}
"""They need a policy with limits; tried below."""


OF_POLICY = {name for name, case in CASES.items() if case.if_policy}
"""They need credentials, models and the like in the policy; tried in test_armed.py, those for units in tests/systemd."""


@pytest.mark.parametrize("case", sorted(set(CASES) - LIMITS - OF_POLICY))
def test_attack_is_denied(case: str, battery: dict[str, dict[str, Any]]) -> None:
    """The attack fails, nothing on the host was touched, and what must work works."""
    result = battery[case]
    expected = "warned" if CASES[case].warned_of else "denied"

    assert result["outcome"] == expected, f"{result['detail']}\nexpected: {CASES[case].expect}"
    assert result["twin"] in ("ok", "none")


def test_what_a_policy_does_not_have_is_counted_and_no_noise(prover: User, battery: dict[str, dict[str, Any]]) -> None:
    """A plain agent has no secrets to attack: no line in the report, a number in its last one, and no failure."""
    done = prover.run("prove", "shell", "--case", "llm-keys", "--case", "fs-spellings", cwd=prover.home / "src/project")

    assert {battery[case]["outcome"] for case in OF_POLICY} == {"not-in-policy"}
    assert "llm-keys" not in done.stdout
    assert done.stdout.endswith("1 attacks: 1 denied (1 more are for what this policy does not have)\n")
    assert done.returncode == 0


def test_limits_hold(prover: User) -> None:
    """With limits in the policy, memory, disk and processes cannot be used up."""
    words = ["prove", "limited", "--json", *(word for case in sorted(LIMITS) for word in ("--case", case))]
    done = prover.run(*words, cwd=prover.home / "src/project")

    assert [case["outcome"] for case in json.loads(done.stdout)["cases"]] == ["denied"] * 3, done.stdout


def test_the_address_guard_holds_where_names_are_free(prover: User) -> None:
    """In mode `learn` no allowlist stands before the guard: private, local and own addresses are still refused."""
    cases = ("proxy-private", "proxy-socks-addresses", "proxy-host-header", "proxy-pipelining")
    words = [word for case in cases for word in ("--case", case)]
    done = prover.run("prove", "learning", "--json", *words, cwd=prover.home / "src/project")

    assert {case["outcome"] for case in json.loads(done.stdout)["cases"]} == {"denied"}, done.stdout
    assert done.returncode == 0


def test_opt_outs_of_the_policy_are_named(prover: User) -> None:
    """With `hardening.nested` mounts are opted out, taking away protecting mounts is still denied."""
    words = ["prove", "nested", "--json", "--case", "kernel-mount", "--case", "kernel-umount"]
    done = prover.run(*words, cwd=prover.home / "src/project")
    outcomes = {case["id"]: case["outcome"] for case in json.loads(done.stdout)["cases"]}

    assert outcomes == {"kernel-mount": "opted-out", "kernel-umount": "denied"}


def test_cases_can_use_the_current_project(prover: User) -> None:
    """With --here the workspace is the project one stands in."""
    done = prover.run("prove", "--here", "--case", "fs-home-canary", cwd=prover.home / "src/project")

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sandbox_that_does_not_start_is_one_error(prover: User) -> None:
    """A policy that this version cannot enforce gives exit code 69 and its reason, not a report."""
    done = prover.run("prove", "impossible", cwd=prover.home / "src/project")

    assert (done.returncode, done.stdout) == (69, "")
    assert "sandbox-not-started" in done.stderr


def test_the_ladder_reads_its_canaries_without_cloister_only(prover: User) -> None:
    """Unconfined all three canaries are reached, in Cloister none."""
    done = prover.run("prove", "--ladder", "--json", cwd=prover.home / "src/project")
    rungs = json.loads(done.stdout)

    assert rungs[0]["reached"] == ["C1", "C2", "C3"]
    assert rungs[-1] == {"name": "cloister", "reached": [], "cannot_run": ""}
    assert done.returncode == 0


def test_the_battery_is_large_and_covers_its_classes() -> None:
    """At least 80 cases; every class of attack that applies to this backend has one."""
    classes = {number for case in CASES.values() for number in case.classes}
    applies = {*range(1, 24), *range(25, 51), 51, 53, 54, 55, 56, 58, 63, 64, 65, 66, 67, 85, 86, 88}
    elsewhere = {14}  # applying an overlay is not done by the agent; tests/kernel/test_overlay.py

    assert len(CASES) >= 80
    assert applies - elsewhere <= classes


def test_json_has_the_counts_and_the_exit_code(battery: dict[str, dict[str, Any]]) -> None:
    """Each result carries what a report needs: title, promise, classes, expectation, time."""
    for result in battery.values():
        assert {"title", "promise", "classes", "expect", "outcome", "detail", "twin", "seconds"} <= set(result)
