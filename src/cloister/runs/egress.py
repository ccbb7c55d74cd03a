"""The bridge from a run to the relay: its session, and the question to the user in mode `ask`."""

from __future__ import annotations

import asyncio

from cloister.egress.decision import Target
from cloister.relay.session import Answer, Session, UpstreamProxy
from cloister.runs.active import ActiveRun
from cloister.runs.approvals import Approvals
from cloister.runs.prepare import Prepared

ASK_TIMEOUT_S = 120.0
_LETTERS: dict[str, Answer] = {"o": "once", "r": "run", "a": "always", "n": "never"}


def session_for(run: ActiveRun, prepared: Prepared, approvals: Approvals, upstream: UpstreamProxy | None) -> Session:
    """Return what the relay needs to serve a run."""
    asker = _Asker(run, approvals)
    return Session(
        run=run.plan.run,
        rules=prepared.ruleset,
        guard=prepared.guard,
        record=run.note,
        ask=asker.ask,
        upstream=upstream,
    )


class _Asker:
    """Asks one question at a time; the same question asked twice at once is one question."""

    def __init__(self, run: ActiveRun, approvals: Approvals) -> None:
        self._run = run
        self._approvals = approvals
        self._lock = asyncio.Lock()

    async def ask(self, target: Target) -> Answer:
        """Return the user's answer; raises LookupError where nobody answers."""
        agent, host, port = self._run.plan.agent, target.host.text, target.port
        async with self._lock:
            kept = self._approvals.find(agent, host, port)
            if kept:
                return "always" if kept == "always" else "never"
            answer = await self._question(f"{agent} wants to reach {target.authority}")
            self._run.write_event("answer", {"host": host, "port": port, "answer": answer})
            if answer in ("always", "never"):
                self._approvals.keep(agent, host, port, answer)
            return answer

    async def _question(self, what: str) -> Answer:
        if not self._run.plan.launch.pty:
            raise LookupError("the run has no terminal to ask at")
        got: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def answered(letter: str) -> None:
            if not got.done():
                got.set_result(letter)

        self._run.ask(f"cloister: {what}\n  [o]nce, for this [r]un, [a]lways, [n]ever? ", "orand", "d", answered)
        letter = await asyncio.wait_for(got, ASK_TIMEOUT_S)
        if letter not in _LETTERS:
            raise LookupError("not answered")
        return _LETTERS[letter]
