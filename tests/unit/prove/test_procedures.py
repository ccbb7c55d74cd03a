"""What an attack's end means that takes its run along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from cloister.prove.case import load
from cloister.prove.procedures import PROCEDURES
from cloister.prove.session import SessionError

MEMORY = load()["limits-memory"]
ENDED = "cloister: the run used up its memory_max and was ended [oom-killed]"


class Ended:
    """A run that ends while it is attacked."""

    def __init__(self, words: str) -> None:
        self._words = words

    def ask(self, _request: dict[str, Any]) -> dict[str, Any]:
        """End."""
        raise SessionError(self._words)


class Battery:
    """Starts such runs."""

    def __init__(self, words: str) -> None:
        self._words = words

    @contextlib.contextmanager
    def session(self, _workspace: str) -> Iterator[Ended]:
        """Start one."""
        yield Ended(self._words)


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        (ENDED, "denied"),
        ("cloister: the run used up its memory_max and was ended", "error"),
        ("cloister: the broker ended while the run lived [broker-died]", "error"),
        ("no answer within 18 s", "error"),
    ],
)
def test_a_run_that_its_limit_ended_has_refused(words: str, outcome: str) -> None:
    """Where one process too much ends all of a unit (OOMPolicy=kill): by that reference, and by no other end."""
    answers = PROCEDURES[MEMORY.procedure](Battery(words), MEMORY, "/nowhere", {})  # type: ignore[arg-type]
    assert [one["outcome"] for one in answers] == [outcome]
    assert words in answers[0]["detail"]


def test_another_attack_may_not_end_its_run_so() -> None:
    """Only what uses up memory is refused by that."""
    assert [case.id for case in load().values() if case.ended_by] == ["limits-memory"]
