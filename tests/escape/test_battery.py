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


@pytest.mark.parametrize("case", sorted(set(CASES) - LIMITS))
def test_attack_is_denied(case: str, battery: dict[str, dict[str, Any]]) -> None:
    """The attack fails, nothing on the host was touched, and what must work works."""
    result = battery[case]
    expected = "warned" if CASES[case].warned_of else "denied"

    assert result["outcome"] == expected, f"{result['detail']}\nexpected: {CASES[case].expect}"
    assert result["twin"] in ("ok", "none")


def test_limits_hold(prover: User) -> None:
    """With limits in the policy, memory and disk cannot be used up."""
    words = ["prove", "limited", "--json", "--case", "limits-memory", "--case", "limits-disk"]
    done = prover.run(*words, cwd=prover.home / "src/project")

    assert [case["outcome"] for case in json.loads(done.stdout)["cases"]] == ["denied", "denied"], done.stdout


def test_the_battery_is_large_and_covers_its_classes() -> None:
    """At least 80 cases; every class of attack that applies to this backend has one."""
    classes = {number for case in CASES.values() for number in case.classes}
    applies = {*range(1, 24), *range(25, 51), 51, 53, 54, 55, 56, 58, 63, 64, 85, 86, 88}
    elsewhere = {14}  # applying an overlay is not done by the agent; tests/kernel/test_overlay.py

    assert len(CASES) >= 80
    assert applies - elsewhere <= classes


def test_json_has_the_counts_and_the_exit_code(battery: dict[str, dict[str, Any]]) -> None:
    """Each result carries what a report needs: title, promise, classes, expectation, time."""
    for result in battery.values():
        assert {"title", "promise", "classes", "expect", "outcome", "detail", "twin", "seconds"} <= set(result)
