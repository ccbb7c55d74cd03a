"""The bridge from a run to the relay: its session, and the question to the user in mode `ask`."""

from __future__ import annotations

from collections.abc import Callable

from cloister.egress.decision import Target
from cloister.relay.exchange import Exchange
from cloister.relay.session import Answer, Session, UnansweredError, UpstreamProxy
from cloister.runs.active import ActiveRun
from cloister.runs.approvals import Approvals, Kept
from cloister.runs.prepare import Prepared
from cloister.runs.questions import NOBODY, ask_letter

_LETTERS: dict[str, Answer] = {"o": "once", "r": "run", "a": "always", "n": "never"}
_TEXT = "cloister: {what}\n  [o]nce, for this [r]un, [a]lways, [n]ever, [D]eny this time? "


def session_for(
    run: ActiveRun, prepared: Prepared, approvals: Approvals, upstream: UpstreamProxy | None,
    models: Callable[[Exchange], None] | None = None,
) -> Session:  # fmt: skip
    """Return what the relay needs to serve a run."""
    asker = _Asker(run, approvals)
    return Session(
        run=run.plan.run,
        rules=prepared.ruleset,
        guard=prepared.guard,
        record=run.note,
        ask=asker.ask,
        recall=asker.recall,
        upstream=upstream,
        broker=run.credentials,
        models=models,
    )


class _Asker:
    """Asks one question at a time. The gate joins equal questions of one run; kept answers are those of all runs."""

    def __init__(self, run: ActiveRun, approvals: Approvals) -> None:
        self._run = run
        self._approvals = approvals
        unit = run.plan.launch.unit
        self._who = unit.account if unit else run.plan.agent
        """Whose answers count: of the system's broker, those of one user do not count for another."""

    def recall(self, target: Target) -> Answer | None:
        """Return what the user said earlier, in this run or another one of this agent."""
        return self._approvals.find(self._who, target.host.text, target.port) or None

    async def ask(self, target: Target) -> Answer:
        """Return the user's answer.

        Raises:
            UnansweredError: there is none; says why.
        """
        agent, host, port = self._run.plan.agent, target.host.text, target.port
        if not self._run.plan.launch.pty:
            why = f"no rule names this host, and the run has no terminal to ask about {target.authority} at"
            raise UnansweredError("no-terminal", why)
        async with self._run.asking:
            kept = self.recall(target)  # another run asked the same while this one waited
            if kept:
                return kept
            answer = await self._question(_TEXT.format(what=f"{agent} wants to reach {target.authority}"))
            self._run.write_event("answer", {"host": host, "port": port, "answer": answer})
            if answer in ("always", "never"):
                self._keep(self._who, host, port, "always" if answer == "always" else "never")
            return answer

    def _keep(self, agent: str, host: str, port: int, answer: Kept) -> None:
        """Write an answer down. Where that fails it counts for this run, and the record says so."""
        try:
            self._approvals.keep(agent, host, port, answer)
        except OSError as error:
            self._run.write_event("warning", {"what": f"the answer was not kept: {error.strerror}"})

    async def _question(self, text: str) -> Answer:
        letter = await ask_letter(self._run, text, "orand", "d")
        if letter == NOBODY:
            raise UnansweredError("not-answered", "nobody answered the question about this host")
        if letter not in _LETTERS:
            raise UnansweredError("denied-this-time", "the user refused this host this time")
        return _LETTERS[letter]
