"""Budgets at the person's terminal: what is asked there, and what is shown beside it."""

import json
import time
from pathlib import Path

import pytest
from test_runs import messages, set_up

from support.cloister import User
from support.fake_model import FakeModel
from support.terminal import Terminal

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.parametrize("key", ["y", "n"])
def test_a_budget_is_granted_at_the_terminal(user: User, workspace: Path, key: str) -> None:
    """`on_exhausted = "ask"`: the question stands at the run's terminal, and its answer decides about the call."""
    with FakeModel() as model:
        set_up(user, model, 'tokens_per_day = 80\non_exhausted = "ask"\n')
        script = f"{messages()}; echo; echo ONE; {messages()}; echo; echo TWO; sleep 0.2"
        command = user.command("run", "shell", "--", "/bin/sh", "-c", script)
        with Terminal(command, cwd=workspace, env=user.environment) as terminal:
            seen = terminal.answer("grant the same amount once more?", key)
            assert "has used up tokens_per_day" in seen
            rest = terminal.until("TWO")
            terminal.wait()
            assert terminal.restored
        asked = 2 if key == "y" else 1
        assert len(model.requests) == asked, seen + rest
        assert ("FAKE-OK" in rest) == (key == "y")
        user.close()
        (events,) = user.state.glob("runs/*/events.jsonl")
        found = [json.loads(line) for line in events.read_text().splitlines()]
        (answer,) = [one for one in found if one["event"] == "answer"]
        assert answer["answer"] == ("granted" if key == "y" else "refused")
        assert any(one["event"] == "budget-granted" for one in found) == (key == "y")


def test_an_alert_disturbs_no_screen_and_is_seen_beside_it(user: User, workspace: Path) -> None:
    """Shares that are passed stand in `ps`, `inspect` and, when it is over, on the terminal; never among the output."""
    with FakeModel() as model:
        set_up(user, model, "tokens_per_day = 90\nalerts = [15]\n")
        script = f"{messages()}; echo; touch called; while [ ! -e go ]; do sleep 0.05; done; echo END"
        command = user.command("run", "shell", "--", "/bin/sh", "-c", script)
        with Terminal(command, cwd=workspace, env=user.environment) as terminal:
            deadline = time.monotonic() + 20
            while not (workspace / "called").exists():
                assert time.monotonic() < deadline
                assert terminal.silent(0.05, "% of")
            (row,) = json.loads(user.run("ps", "--json", cwd=workspace).stdout)
            assert row["budget"] == "15 % of tokens_per_day"
            assert "15 % of tokens_per_day" in user.run("ps", cwd=workspace).stdout
            assert "15 % of tokens_per_day passed" in user.run("inspect", "last", cwd=workspace).stdout
            assert terminal.silent(0.2, "% of")
            (workspace / "go").touch()
            terminal.until("END")
            terminal.wait()
            assert b"15 % of tokens_per_day used" in terminal.shown
        user.close()
        (receipt,) = user.receipts()
        assert any("[budget-alert]" in text for text in receipt["warnings"])
