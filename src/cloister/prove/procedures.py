"""How a case is led that cannot share a run: several runs one after another, processes killed, a terminal.

Each procedure returns the answers of the driver, or answers of its own about what it saw.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cloister.prove.case import Case
from cloister.prove.outside import from_outside
from cloister.prove.session import COMMAND, Session, SessionError

if TYPE_CHECKING:
    from cloister.prove.runner import Battery

Answers = list[dict[str, Any]]
DEATH_S = 6.0


def in_turn(battery: Battery, case: Case, workspace: str, facts: dict[str, Any]) -> Answers:
    """Call each stage in a run of its own, in the same workspace."""
    answers = []
    for stage in case.stages:
        with battery.session(workspace) as session:
            answers.append(_ask(session, case, stage, facts, twin=stage == case.stages[-1]))
    return answers


def next_start(battery: Battery, case: Case, workspace: str, facts: dict[str, Any]) -> Answers:
    """Like `in_turn`; a later start that Cloister refuses by name is a denial too."""
    answers: Answers = []
    for stage in case.stages:
        try:
            with battery.session(workspace) as session:
                answers.append(_ask(session, case, stage, facts, twin=stage == case.stages[-1]))
        except SessionError as error:
            refused = re.search(r"\[(workspace|git|policy|project)-[a-z-]+\]", str(error))
            if not answers or not refused:
                raise
            answers.append({"outcome": "denied", "detail": f"the next start is refused: {refused[0]}"})
    return answers


def kill_broker(battery: Battery, case: Case, workspace: str, facts: dict[str, Any]) -> Answers:
    """Kill the broker with SIGKILL while the case's processes live: the run must end, and nothing may go direct."""
    return _kill(battery, case, workspace, facts, lambda _: battery.ground.stop_broker(signal.SIGKILL))


def kill_client(battery: Battery, case: Case, workspace: str, facts: dict[str, Any]) -> Answers:
    """Kill the process that the user started with SIGKILL: the run must end."""
    return _kill(battery, case, workspace, facts, lambda session: os.kill(session.pid, signal.SIGKILL))


def _kill(
    battery: Battery, case: Case, workspace: str, facts: dict[str, Any], kill: Callable[[Session], None]
) -> Answers:
    answers = []
    with battery.session(workspace) as session:
        answers.append(_ask(session, case, case.stages[0], facts, twin=False))
        kill(session)
        started = time.monotonic()
        with contextlib.suppress(SessionError):
            while time.monotonic() - started < DEATH_S:
                session.ask(_request(case, case.stages[-1], facts, twin=False) | {"limit_s": 2.0})
                time.sleep(0.05)
            answers.append({"outcome": "allowed", "detail": f"the run lived on for {DEATH_S:g} s"})
    if len(answers) == 1:
        answers.append({"outcome": "denied", "detail": f"the run was over {time.monotonic() - started:.1f} s later"})
    return answers


def _ask(session: Session, case: Case, stage: str, facts: dict[str, Any], *, twin: bool) -> dict[str, Any]:
    try:
        return session.ask(_request(case, stage, facts, twin=twin))
    except SessionError as error:
        refused = bool(case.ended_by) and f"[{case.ended_by}]" in str(error)
        return {"outcome": "denied" if refused else "error", "detail": f"the run ended: {error}"}


def _request(case: Case, stage: str, facts: dict[str, Any], *, twin: bool) -> dict[str, Any]:
    return {
        "id": case.id,
        "source": case.source,
        "function": stage,
        "twin": twin,
        "facts": facts,
        "limit_s": case.limit_s,
    }


def in_terminal(battery: Battery, case: Case, workspace: str, facts: dict[str, Any]) -> Answers:
    """Run the case with a terminal of the host as its caller's: what it types there would be typed for the user."""
    from cloister.prove.terminal import converse

    argv = battery.ground.command(workspace, COMMAND, pty=True)
    environment = battery.ground.environment | battery.canaries.environment
    return converse(argv, workspace, environment, _request(case, case.stages[0], facts, twin=False))


PROCEDURES: dict[str, Callable[[Any, Case, str, dict[str, Any]], Answers]] = {
    "in-turn": in_turn,
    "next-start": next_start,
    "kill-broker": kill_broker,
    "kill-client": kill_client,
    "terminal": in_terminal,
    "from-outside": from_outside,
}
