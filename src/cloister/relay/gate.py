"""The one door: decide, ask the user where the mode says so, and remember the answers of this run."""

from __future__ import annotations

import asyncio

from cloister.egress import decision
from cloister.egress.addresses import Guard
from cloister.egress.decision import Target, Verdict
from cloister.egress.hosts import HOST_LOOPBACK_NAME, Address
from cloister.egress.rules import Ruleset
from cloister.relay.session import Answer, Session, UnansweredError

Place = tuple[str, int]


class Gate:
    """Holds the rules in force and the answers given so far."""

    def __init__(self, session: Session) -> None:
        """Start with the session's rules and no answers."""
        self.rules = session.rules
        self.guard = session.guard
        self._session = session
        self._granted: set[Place] = set()
        self._refused: set[Place] = set()
        self._questions: dict[Place, asyncio.Task[Answer | UnansweredError]] = {}

    def decide(self, target: Target) -> Verdict:
        """Decide without asking."""
        verdict = decision.decide(self.rules, self.guard, target, granted=self._granted, refused=self._refused)
        if verdict.action != "ask":
            return verdict
        kept = self._session.recall(target)
        if kept is None:
            return verdict
        if kept == "never":
            return _refused_for_good(verdict)
        return Verdict("allow", "allowed-by-user", explanation="the user always allows this host")

    def admit(self, target: Target, address: Address) -> Verdict | None:
        """Judge an address of an allowed name; the host's loopback was opened by an explicit rule."""
        if target.host.text == HOST_LOOPBACK_NAME:
            return None
        return decision.admit(self.rules, self.guard, target, address)

    async def permit(self, target: Target) -> Verdict:
        """Decide, waiting for the user where needed. The result is never `ask`.

        Clients that wait for the same place share one question, and it outlives a client that leaves.
        """
        verdict = self.decide(target)
        if verdict.action != "ask":
            return verdict
        question = self._questions.get(target.place)
        if question is None:
            question = asyncio.get_running_loop().create_task(self._ask(target))
            self._questions[target.place] = question
        answer = await asyncio.shield(question)
        if isinstance(answer, UnansweredError):
            return Verdict("deny", answer.reason, "", answer.explanation, verdict.remedy)
        if answer == "never":
            return _refused_for_good(verdict)
        again = self.decide(target)  # the policy may have changed while the question stood
        if again.action == "deny":
            return again
        return Verdict("allow", "allowed-by-user", explanation="the user allowed this host")

    def update(self, rules: Ruleset, guard: Guard) -> None:
        """Put new rules in force. Answers of this run stay: deny rules win over them; kept ones are recalled anew."""
        self.rules, self.guard = rules, guard

    def close(self) -> None:
        """Drop open questions: whoever waits is refused."""
        for question in self._questions.values():
            question.cancel()

    async def _ask(self, target: Target) -> Answer | UnansweredError:
        """Put the question. An answer that is kept counts for as long as it is: `recall` knows it."""
        try:
            answer: Answer | UnansweredError = await self._session.ask(target)
        except UnansweredError as error:
            answer = error
        except asyncio.CancelledError:
            answer = UnansweredError("not-answered", "the run ended before the question about this host was answered")
        except Exception:  # noqa: BLE001 - whatever keeps the user from answering means: refused
            answer = UnansweredError("not-answered", "the question about this host could not be put")
        finally:
            self._questions.pop(target.place, None)
        if answer == "run" or (answer == "always" and self._session.recall(target) is None):
            self._granted.add(target.place)
        elif answer == "never" and self._session.recall(target) is None:
            self._refused.add(target.place)
        return answer


def _refused_for_good(verdict: Verdict) -> Verdict:
    return Verdict("deny", "denied-by-user", "", "the user refused this host", verdict.remedy)
