"""Cases that attack from the user's side of the host: what a hostile program of the person's could ask of root.

A run lives meanwhile. The case's first stage is tried by a process of the user outside of any sandbox; its last
one inside that run, which must be as it was.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

from cloister.prove import units
from cloister.prove.case import Case
from cloister.prove.session import PYTHON, SessionError, answer_in, bootstrap

if TYPE_CHECKING:
    from cloister.prove.runner import Battery

LIMIT_S = 60.0
_START, _END = "<<<case ", ">>>"


def from_outside(battery: Battery, case: Case, workspace: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Try the first stage as the user, the last one in a run that lived through it."""

    def request(stage: str, more: dict[str, Any], *, twin: bool) -> dict[str, Any]:
        return {"id": case.id, "source": case.source, "function": stage, "twin": twin, "facts": facts | more,
                "limit_s": case.limit_s}  # fmt: skip

    with battery.session(workspace) as session:
        more = units.attack_facts(workspace, battery.ground.base)
        words = [PYTHON, "-I", "-S", "-B", "-c", bootstrap(request(case.stages[0], more, twin=True), _START, _END)]
        done = subprocess.run(
            words, cwd=workspace, env=battery.ground.environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=LIMIT_S, check=False,
        )  # fmt: skip
        first = answer_in(done.stdout, _START, _END) or {
            "outcome": "error", "detail": f"no answer from outside: {done.stderr[-300:]}"
        }  # fmt: skip
        try:
            last = session.ask(request(case.stages[-1], {}, twin=False))
        except SessionError as error:
            last = {"outcome": "allowed", "detail": f"the run of somebody else ended: {error}"}
    both = "; ".join(str(answer["detail"]) for answer in (first, last) if answer["outcome"] == "denied")
    return [first, {**last, "twin": first.get("twin", "none"), "detail": both or last["detail"]}]
