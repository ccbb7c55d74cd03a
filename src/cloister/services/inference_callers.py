"""Who calls the inference service: holders of virtual keys, and runs that show an identity token of this user.

A key stands for its agent. A token (audience `cloister`) stands for the run that it names, as long as it proves
anything: it is looked at with every request, so that what was revoked opens nothing from then on, and calls of a
revoked run or agent are ended where they are. What a run may do is said by the policy as it is now, narrowed by the
project it runs in; a token of a run that left no plan here opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister.errors import CloisterError, PolicyError, Problem, UnsupportedError
from cloister.llm.errors import Refusal
from cloister.policy.model import Llm, Policy
from cloister.relay.llm.service import Caller
from cloister.runs.model_calls import ModelCalls
from cloister.runs.policies import PolicyFiles, Source
from cloister.runs.store import Store, is_id

if TYPE_CHECKING:
    from cloister.identity.tokens import Claims
    from cloister.runs.identity_store import IdentityStore

MOST_RUNS = 1024
"""Runs that are remembered; beyond it, those without a call under way are forgotten and read again when they call."""
METRICS = "@metrics"
"""In the place of an agent's name, which never begins so: who may read the metrics."""
_SHORTEST_KEY = 16


class Keys:
    """Virtual keys, by their text."""

    def __init__(self, source: Source) -> None:
        """Read the lines of a file.

        Raises:
            PolicyError: a line is not `AGENT KEY`, or a key is too short to be one.
        """
        self.agents: list[tuple[str, str]] = []
        watchers: set[str] = set()
        for number, line in enumerate(source.text.decode("utf-8", "replace").splitlines(), 1):
            words = line.split()
            if not words or line.startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) < _SHORTEST_KEY:  # noqa: PLR2004 - AGENT KEY
                problem = Problem("a line is AGENT KEY, the key at least 16 characters", f"{source.path}:{number}")
                raise PolicyError([problem], reference="keys-invalid")
            if words[0] == METRICS:
                watchers.add(words[1])
            else:
                self.agents.append((words[0], words[1]))
        self.watchers = frozenset(watchers)


class Callers:
    """Finds the caller of a request."""

    def __init__(  # noqa: PLR0913 - where to ask about whom
        self, files: PolicyFiles, store: Store, calls: ModelCalls, user: str, *,
        identity: Callable[[], IdentityStore], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Know nobody yet.

        Args:
            files: the policy.
            store: of runs, for their plans.
            calls: where callers live.
            user: whose keys they are; a token names its own.
            identity: opens the store that judges tokens; called with the first token.
            say: told why somebody is not let in, where the person should know.
        """
        self._files, self._store, self._calls, self._user = files, store, calls, user
        self._identity_of, self._say = identity, say
        self._identity: IdentityStore | None = None
        self._known: dict[str, Caller] = {}
        self._agents: dict[str, Caller] = {}
        self._runs: dict[str, Caller] = {}
        self._issued: dict[str, int] = {}

    def identify(self, tokens: list[str]) -> Caller | None:
        """Return who presents one of these tokens."""
        for token in tokens:
            caller = self._known.get(token) or self._of_token(token)
            if caller is not None:
                return caller
        return None

    def load(self, keys: Keys | None) -> None:
        """Put policy and keys as they are now in force; callers that are known keep what they used.

        Raises:
            CloisterError: one of them is wrong; everything is as before.
        """
        self._files.document()
        known = {}
        for agent, key in keys.agents if keys else ():
            self._files.admit(self._user, agent)
            resolved = self._files.resolve(agent)
            _refuse_record(agent, resolved.agent.llm)
            known[key] = self._agent(agent, resolved.agent.llm, resolved.policy)
        self._known = known
        for run, caller in list(self._runs.items()):
            try:
                found = self._allowed(run, caller.agent)
                if found is not None:
                    self._calls.update(caller, *found)
            except CloisterError as error:  # what its project says does not fit any more
                self._say(f"run {run}: {error.message} [{error.reference}]")
                found = None
            if found is None:
                self._forget(run)

    async def check_keys(self) -> None:
        """Say which providers' keys cannot be had; the service serves the others."""
        for agent in self._agents:
            try:
                await self._calls.check_keys(self._files.resolve(agent).agent.llm)
            except CloisterError as error:
                self._say(f"{error.message} ({error.where})")

    def obey_revocations(self) -> None:
        """End calls of runs and agents whose tokens are void meanwhile, and forget them."""
        if not self._runs or self._identity is None:
            return
        try:
            state = self._identity.read()
        except CloisterError as error:
            self._say(error.message)
            return
        for run, caller in list(self._runs.items()):
            if state.is_revoked("run", run) or self._issued[run] <= state.revoked_at(caller.agent):
                refusal = Refusal(403, "token-revoked", "the identity of this run was revoked", again=False)
                for call in [one for one in self._calls.inference.calls if one.caller is caller]:
                    call.cut(refusal)
                self._forget(run)

    # Inside.

    def _agent(self, agent: str, llm: Llm, policy: Policy) -> Caller:
        caller = self._agents.get(agent)
        if caller is None:
            caller = self._agents[agent] = self._calls.caller(f"service-{agent}", agent, self._user, llm, policy)
        else:
            self._calls.update(caller, llm, policy)
        return caller

    def _of_token(self, token: str) -> Caller | None:
        """Return the run that a token proves to be calling."""
        if token.count(".") != 2:  # noqa: PLR2004 - three parts
            return None
        from cloister.identity.authority import Demand
        from cloister.identity.tokens import TokenError

        try:
            if self._identity is None:
                self._identity = self._identity_of()
            claims = self._identity.verify(token, Demand())
            caller = self._runs.get(claims.run) or self._admit(claims)
        except TokenError:
            return None
        except CloisterError as error:
            self._say(f"a token was not accepted: {error.message} [{error.reference}]")
            return None
        if caller is not None:
            self._issued[claims.run] = max(claims.iat, self._issued.get(claims.run, 0))
        return caller

    def _admit(self, claims: Claims) -> Caller | None:
        """Make a caller of a run that calls for the first time."""
        found = self._allowed(claims.run, claims.agent)
        if found is None:
            return None
        caller = self._calls.caller(claims.run, claims.agent, claims.user, *found)
        self._runs[claims.run] = caller
        if len(self._runs) > MOST_RUNS:
            busy = {id(call.caller) for call in self._calls.inference.calls} | {id(caller)}
            for run in [run for run, one in self._runs.items() if id(one) not in busy][: MOST_RUNS // 2]:
                self._forget(run)
        return caller

    def _allowed(self, run: str, agent: str) -> tuple[Llm, Policy] | None:
        """Return what the policy gives a run, its profile and project included; None where it gives no models."""
        plan = self._store.plan(run) if is_id(run) else None
        if plan is None or plan.agent != agent:
            return None
        resolved = self._files.resolve(agent, plan.profile, workspace=plan.project)
        _refuse_record(agent, resolved.agent.llm)
        return (resolved.agent.llm, resolved.policy) if resolved.agent.llm.providers else None

    def _forget(self, run: str) -> None:
        self._calls.left(self._runs.pop(run))
        self._issued.pop(run, None)


def _refuse_record(agent: str, llm: Llm) -> None:
    """Let nobody in whose calls have to be recorded: a call that went this way would be missing in the record.

    Raises:
        UnsupportedError: says what to do.
    """
    if llm.record:
        raise UnsupportedError(
            "policy-not-enforceable", "this service keeps no recordings, so an agent with `llm.record` cannot call it",
            where=f".agents.{agent}.llm.record", remedy="remove `record`, or let its runs call by their own sockets",
        )  # fmt: skip
