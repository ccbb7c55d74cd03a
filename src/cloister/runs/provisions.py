"""What a run has beside its sandbox: credentials, identity tokens, its way to models, keys of the person's agents.

The supervisor opens them before anything is changed on the host, serves them while the run lives, brings
a reloaded policy to them and ends them, without knowing what they are. Each imports what it needs
with the first run that has it; a run that has none of them costs nothing here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from cloister.host import apply as host_apply
from cloister.host.apply import Applied
from cloister.plan.steps import Plan
from cloister.relay.server import EgressServer
from cloister.relay.session import UpstreamProxy
from cloister.runs.active import ActiveRun
from cloister.runs.approvals import Approvals
from cloister.runs.identity import Identities, RunTokens
from cloister.runs.models import RunModels
from cloister.runs.prepare import Kitchen, Prepared
from cloister.runs.request import RunRequest
from cloister.runs.signing import refuse_missing

if TYPE_CHECKING:
    from cloister.llm.ledger import Row
    from cloister.runs.credentials import RunCredentials
    from cloister.runs.credentials_start import CredentialStarts
    from cloister.runs.logins import LoginEvent
    from cloister.runs.metrics import Told
    from cloister.runs.store import ModelUse


class Provided(msgspec.Struct, frozen=True):
    """What was opened for one run that is about to start."""

    credentials: RunCredentials | None
    tokens: RunTokens | None


class Provisions:
    """Those of all runs of one broker."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, kitchen: Kitchen, living: Callable[[], Iterable[ActiveRun]]
    ) -> None:
        """Open nothing yet; `living` returns the runs that are alive."""
        paths, owner = kitchen.paths, kitchen.owner
        self._loop = loop
        self._paths = paths
        self._living = living
        self.called: Callable[[ActiveRun, Row], None] = lambda _run, _row: None
        """Told of each model call that ended."""
        self._approvals = Approvals(paths.decisions)
        self._identities = Identities(loop, paths.state)
        self._owner = owner
        self._credentials: CredentialStarts | None = None
        self._models = RunModels(
            paths, owner, lambda: self._starts().logins, kitchen.policies.ledger, self._identities.store
        )

    async def open(self, prepared: Prepared, request: RunRequest, since: float) -> Provided:
        """Look at everything a run needs, before anything is changed for it.

        Raises:
            CloisterError: something of it cannot be had; says what to type.
        """
        plan = prepared.plan
        refuse_missing(prepared.sources)
        if prepared.sources.gpg:
            from cloister.runs.signing_gpg import wake

            await self._loop.run_in_executor(None, wake, prepared.sources, request.environment)
        if prepared.placeholders:
            await self._models.open(prepared)
        try:
            credentials = await self._starts().open(prepared, request) if plan.credentials else None
            tokens = await self._identities.admit(plan, since)
        except BaseException:
            self._models.left(plan.run)
            raise
        return Provided(credentials, tokens)

    def apply(self, provided: Provided, plan: Plan) -> Applied:
        """Apply the plan with what was opened; undo it where that fails.

        Raises:
            CloisterError: the host refused a step; everything is as before.
        """
        credentials, tokens = provided.credentials, provided.tokens
        applied = host_apply.apply(plan, self._paths.state, *(credentials.for_apply if credentials else ()))
        try:
            if tokens:
                self._identities.begin(tokens)
        except BaseException:
            applied.close()
            host_apply.undo(plan, self._paths.state)
            raise
        return applied

    def attach(self, provided: Provided, run: ActiveRun) -> None:
        """Tell a run what is its own, and what was opened where to write events."""
        run.use(provided.credentials)
        if provided.tokens:
            provided.tokens.tell(run.write_event)

    async def serve(self, run: ActiveRun, prepared: Prepared, applied: Applied, upstream: UpstreamProxy | None) -> None:
        """Serve the run's sockets: its egress with its models, and the person's agents that it may use."""
        from cloister.runs.egress import session_for

        models = self._models.serve(run, prepared, self.called) if prepared.placeholders else None
        server = EgressServer(session_for(run, prepared, self._approvals, upstream, models))
        run.egress = server
        assert applied.listener is not None  # noqa: S101  # every plan has a Listen step
        await server.start(applied.listener)
        if applied.agents:
            from cloister.runs.agent_services import Signers

            run.signing = Signers(prepared.sources, os.getuid(), run.note_signing)
            await run.signing.start(applied.agents)

    def placeholders(self, run: ActiveRun) -> dict[str, str]:
        """Return the variables that hold a run's placeholders, for further commands in it."""
        return run.placeholders | self._models.placeholders(run.plan.run)

    def reload(self, run: ActiveRun, kitchen: Kitchen) -> tuple[str, ...]:
        """Put the policy as it is now in force for a living run; return the credentials that were taken away.

        Raises:
            CloisterError: the policy is broken, or something could not be brought to it.
        """
        agent, rules = kitchen.now_for(run.plan)
        self._models.reload(run, *kitchen.models_of(run.plan))
        revoked = run.obey(agent, *rules)
        self._identities.narrow(run.plan.run, agent.identity, kitchen.policies.digest)
        return revoked

    async def models_used(self, run: ActiveRun) -> ModelUse | None:
        """Return what a run's model calls used; None where the ledger cannot be asked."""
        return await self._models.used(run.plan.run, run.plan.agent, run.record.user, run.record.started)

    def obey_blocks(self) -> int:
        """Obey the kill switch of model calls as it is now; return how many calls under way were ended."""
        return self._models.obey_blocks()

    def metrics(self) -> Told | None:
        """Return the numbers of model calls; None where none was made."""
        return self._models.metrics()

    async def end(self, run: ActiveRun) -> tuple[str, ...]:
        """End what a run has but its egress; return what its receipt should say."""
        lost = await self._identities.end(run.plan.run)
        if run.signing:
            await run.signing.close()
        if run.credentials:
            run.credentials.close()
        return (lost,) if lost else ()

    async def withdraw(self, provided: Provided, plan: Plan) -> None:
        """Take back what was opened for a run that did not come to be."""
        await self._identities.end(plan.run)
        if provided.credentials:
            provided.credentials.close()
        self._models.left(plan.run)

    def left(self, run: str) -> tuple[str, ...]:
        """A run is over, or did not come to be: its key opens no model any more. Returns words for its receipt."""
        return self._models.left(run)

    def recover(self, plan: Plan) -> None:
        """Make void what a killed broker's run has left."""
        self._identities.recover(plan)

    async def close(self) -> None:
        """End what outlives runs: calls under way, the books, what is asked for a login."""
        await self._models.close()
        if self._credentials is not None:
            await self._credentials.logins.close()

    def _starts(self) -> CredentialStarts:
        if self._credentials is None:
            from cloister.runs.credentials_start import CredentialStarts

            self._credentials = CredentialStarts(self._paths, self._owner.uid, self._login_event)
        return self._credentials

    def _login_event(self, event: LoginEvent) -> None:
        """Write down what happened to a login with every run that uses it."""
        reference = f"login:{event.login}"
        for run in self._living():
            own = any(one.secret == reference for one in run.plan.credentials)
            if own or self._models.uses(run.plan.run, reference):
                run.write_event("login", msgspec.to_builtins(event))
