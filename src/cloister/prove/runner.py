"""Runs a battery: groups cases into runs, asks for each, compares what it says with what happened to the host.

A case is *denied* only when it says so, its twin works, no canary was disturbed and every
check on the host found nothing. Everything else is *allowed* (an attack got through), *error*
(it proved nothing), *cannot-run* (it says why), *opted-out* (the policy allows it by name),
*warned* (it cannot be prevented, and the run's end says that it happened) or *not-in-policy*
(it attacks a thing that the agent's policy does not have, so there is nothing to prove).
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import msgspec

from cloister.errors import CloisterError
from cloister.prove import needs, procedures, workspaces
from cloister.prove.canaries import Canaries
from cloister.prove.case import Case
from cloister.prove.consequences import CHECKS, Scene
from cloister.prove.session import COMMAND, PYTHON, Session, SessionError
from cloister.runs.store import Store

OUTCOMES = ("denied", "warned", "allowed", "error", "cannot-run", "opted-out", "not-in-policy")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one case."""

    case: Case
    outcome: str
    detail: str
    twin: str = "none"
    """`ok`, `none` (the case has none), or what broke."""
    seconds: float = 0.0


class Ground(Protocol):
    """Where a battery happens, and how a run is started there; `place.Place` is the real one."""

    base: str
    runtime: str
    home: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the command line."""
        ...

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return the command line of a run."""
        ...

    def stop_broker(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End what serves the runs, so that the next one starts fresh."""
        ...


class Battery:
    """All cases against one sandbox."""

    def __init__(  # noqa: PLR0913  # one call, from battery.py
        self, ground: Ground, canaries: Canaries, lifted: frozenset[str], facts: dict[str, Any],
        on_result: Callable[[Result], None] = lambda _: None, here: str = "", held: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        """Take the ground, canaries that sing, the policy's opt-outs, and what cases may know about the host.

        `held` are the words of what the policy has; None means that every case is tried.
        """
        self.ground = ground
        self.canaries = canaries
        self.lifted = lifted
        self.held = held
        self.facts = {**canaries.facts, **facts}
        self.here = here
        self.project_policy = False
        """Whether workspaces are made with a project file in them (`needs.py`)."""
        self._on_result = on_result
        self._count = 0

    def run(self, cases: Iterable[Case]) -> list[Result]:
        """Try every case; return results in the order in which they were tried."""
        wanted = [case for case in cases if not case.arch or platform.machine() in case.arch]
        results: list[Result] = []
        tried = []
        for case in wanted:
            passed = self._passed_over(case)
            if passed:
                results.append(self._report(passed))
            else:
                tried.append(case)
        shapes = dict.fromkeys(case.shape for case in tried if not case.alone)
        for shape in shapes:
            results += self._together([case for case in tried if case.shape == shape and not case.alone], shape)
        alone = [case for case in tried if case.alone]
        alone.sort(key=lambda case: "records-hold-no-secret" in case.checks)  # they look at what all others left
        results += [self._report(self._alone(case)) for case in alone]
        return results

    def _passed_over(self, case: Case) -> Result | None:
        """Return the result of a case that will not be tried: the policy opts out of it, or has nothing to attack."""
        if self.held is not None and case.if_policy and not self.held.intersection(case.if_policy):
            words = " or ".join(case.if_policy)
            return Result(case=case, outcome="not-in-policy", detail=f"the policy gives this agent no {words}")
        lifting = [key for key in case.lifted_by if key in self.lifted]
        if lifting:
            return Result(case=case, outcome="opted-out", detail=f"opted out by policy: {', '.join(lifting)}")
        return None

    # --- many cases in one run --------------------------------------------------------------

    def _together(self, cases: list[Case], shape: str) -> list[Result]:
        results: list[Result] = []
        with contextlib.ExitStack() as prepared:
            try:
                workspace = (
                    self.here if self.here and shape == "any" else self.workspace("clone" if shape == "any" else shape)
                )
                facts = self.facts | {"workspace": workspace} | needs.prepare(cases, self, prepared)
            except (OSError, subprocess.SubprocessError, SessionError) as error:
                return [
                    self._report(Result(case=case, outcome="cannot-run", detail=f"not prepared: {error}"))
                    for case in cases
                ]
            waiting = list(cases)
            while waiting:
                before = len(waiting)
                results += self._one_run(waiting, workspace, facts)
                if len(waiting) == before:
                    break
        return results

    def _one_run(self, waiting: list[Case], workspace: str, facts: dict[str, Any]) -> list[Result]:
        """Work through `waiting` in one run; when the run dies, the case at fault is done and the rest waits."""
        results = []
        try:
            with self.session(workspace) as session:
                while waiting:
                    case = waiting.pop(0)
                    results.append(self._report(self._ask(session, case, workspace, facts)))
                    if results[-1].outcome == "error" and results[-1].detail.startswith("the run ended"):
                        break
        except SessionError as error:
            case = waiting.pop(0)
            results.append(self._report(Result(case=case, outcome="error", detail=f"the run did not start: {error}")))
        return results

    def _ask(self, session: Session, case: Case, workspace: str, facts: dict[str, Any]) -> Result:
        started = time.monotonic()
        try:
            answer = session.ask(request(case, case.stages[-1], facts, twin=True))
        except SessionError as error:
            answer = {"outcome": "error", "detail": f"the run ended: {error}"}
        result = self.judge(case, [answer], workspace)
        return msgspec.structs.replace(result, seconds=time.monotonic() - started)

    # --- one case in runs of its own ----------------------------------------------------------

    def _alone(self, case: Case) -> Result:
        started = time.monotonic()
        try:
            with contextlib.ExitStack() as prepared:
                needed = needs.prepare([case], self, prepared)
                workspace = self.workspace("clone" if case.shape == "any" else case.shape)
                facts = self.facts | needed | {"workspace": workspace}
                answers = procedures.PROCEDURES[case.procedure](self, case, workspace, facts)
            result = self.judge(case, answers, workspace)
        except SessionError as error:
            result = Result(case=case, outcome="error", detail=f"the run did not start: {error}")
        except (OSError, subprocess.SubprocessError, CloisterError) as error:
            result = Result(case=case, outcome="cannot-run", detail=f"not prepared: {error}")
        return msgspec.structs.replace(result, seconds=time.monotonic() - started)

    # --- what both share ------------------------------------------------------------------------

    def workspace(self, shape: str) -> str:
        """Make another workspace."""
        self._count += 1
        path = workspaces.make(self.ground.base, f"project-{self._count}", shape)
        if self.project_policy:
            workspaces.add_project_policy(path)
        return path

    @contextlib.contextmanager
    def session(self, workspace: str) -> Iterator[Session]:
        """Start a run with the driver in it, with things open around it that must not get in."""
        leaks = [os.open("/", os.O_RDONLY | os.O_DIRECTORY), os.open(self.facts["secret"], os.O_RDONLY)]
        try:
            argv = self.ground.command(workspace, COMMAND)
            with Session(argv, workspace, self.ground.environment | self.canaries.environment, leaks) as session:
                yield session
        finally:
            for descriptor in leaks:
                os.close(descriptor)

    def judge(self, case: Case, answers: list[dict[str, Any]], workspace: str) -> Result:
        """Put together what the case said, what its twin said, and what the host saw."""
        said = [answer for answer in answers if answer["outcome"] != "denied"]
        last = said[0] if said else answers[-1]
        outcome, details = str(last["outcome"]), [str(last["detail"])]
        twin = str(answers[-1].get("twin", "none"))
        seen = [what for answer in answers for what in self.canaries.found_in(str(answer))] + self.canaries.disturbed()
        scene = Scene(
            base=self.ground.base, workspace=workspace, runtime=self.ground.runtime, home=self.ground.home,
            found_in=self.canaries.known.found_in,
        )  # fmt: skip
        checks = case.checks if outcome != "cannot-run" else ()  # what was not tried has left nothing to look at
        seen += [found for name in checks if (found := CHECKS[name](scene))]
        if seen and case.warned_of and warned(self.ground.base, workspace, case.warned_of):
            outcome, details = "warned", [f"not prevented, but the run's end names it: {seen[0]}"]
        elif seen:
            outcome, details = "allowed", [*seen, *(details if outcome == "allowed" else [])]
        elif outcome == "denied" and twin not in ("ok", "none"):
            outcome, details = "error", [f"the legitimate neighbour does not work: {twin}"]
        masked = self.canaries.known.masked
        return Result(case=case, outcome=outcome, detail=masked("; ".join(dict.fromkeys(details))), twin=masked(twin))

    def _report(self, result: Result) -> Result:
        self._on_result(result)
        return result


def request(case: Case, function: str, facts: dict[str, Any], *, twin: bool) -> dict[str, Any]:
    """Return the driver's request for one function of a case."""
    return {
        "id": case.id,
        "source": case.source,
        "function": function,
        "twin": twin,
        "facts": facts,
        "limit_s": case.limit_s,
    }


def warned(base: str, workspace: str, word: str) -> bool:
    """Tell whether the receipt of a run in this workspace warns of something by name."""
    store = Store(f"{base}/state/cloister/runs")
    receipts = [receipt for run in store.ids() if (receipt := store.receipt(run)) and receipt.workspace == workspace]
    return any(word in text for receipt in receipts for text in receipt.warnings)


def python_missing() -> bool:
    """Tell whether the program that runs the cases is not there."""
    return not os.access(PYTHON, os.X_OK)
