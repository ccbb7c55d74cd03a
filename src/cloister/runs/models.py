"""The models of living runs: which run is which caller, from its start to its end. What the supervisor talks to.

Nothing of the proxy, its books or its database is imported before the first run that has models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cloister.errors import RetryError
from cloister.host.owner import Owner
from cloister.policy.model import Ledger, Llm, Policy
from cloister.runs.paths import Paths
from cloister.runs.run_recordings import RunRecordings
from cloister.runs.store import ModelUse

if TYPE_CHECKING:
    from cloister.llm.budgets import Alert
    from cloister.llm.errors import Refusal
    from cloister.llm.ledger import Row
    from cloister.relay.exchange import Exchange
    from cloister.relay.llm.service import Caller
    from cloister.runs.active import ActiveRun
    from cloister.runs.identity_store import IdentityStore
    from cloister.runs.login_secrets import LoginSecrets
    from cloister.runs.metrics import Told
    from cloister.runs.model_calls import ModelCalls
    from cloister.runs.model_store import Store
    from cloister.runs.prepare import Prepared


class RunModels:
    """The callers among the runs of one broker."""

    def __init__(
        self, paths: Paths, owner: Owner, logins: Callable[[], LoginSecrets], settings: Callable[[], Ledger],
        identities: Callable[[], IdentityStore],
    ) -> None:  # fmt: skip
        """Open nothing yet.

        Args:
            paths: where things are.
            owner: whose runs they are.
            logins: returns who has the tokens of `login:` references; asked late.
            settings: returns the `[ledger]` that counts now.
            identities: opens the key store, for runs whose calls are recorded.
        """
        self._paths, self._owner, self._logins, self._settings = paths, owner, logins, settings
        self._recordings = RunRecordings(identities)
        self._calls: ModelCalls | None = None
        self._store: Store | None = None
        self._callers: dict[str, Caller] = {}
        self._secrets: dict[str, frozenset[str]] = {}
        self._placeholders: dict[str, dict[str, str]] = {}
        self._notices: dict[str, list[str]] = {}

    async def open(self, prepared: Prepared) -> None:
        """Make sure that a run's calls can be served and written down, before anything of it starts.

        Raises:
            CloisterError: a provider or its key is missing, or the books or prices cannot be opened.
        """
        if prepared.agent.llm.record:
            await asyncio.get_running_loop().run_in_executor(None, self._recordings.unlock)
        await self._leave_old_ledger()
        if self._calls is None:
            from cloister.runs.model_store import Store, calls_of

            self._store = Store(self._paths, self._settings)
            self._calls = calls_of(self._paths, self._owner, self._logins(), self._store)
        run, agent, llm = prepared.plan.run, prepared.plan.agent, prepared.agent.llm
        token = next(iter(prepared.placeholders.values()))
        user = prepared.user or self._owner.name
        caller = self._calls.caller(run, agent, user, llm, prepared.policy, token=token)
        if prepared.kept and prepared.kept.memory:
            caller.former = prepared.kept.memory.model_keys
        try:
            await self._calls.check_keys(llm)
        except BaseException:
            self._calls.left(caller)
            raise
        self._callers[run] = caller
        self._secrets[run] = _references(llm, prepared.policy)
        self._placeholders[run] = prepared.placeholders
        self._notices[run] = []

    async def _leave_old_ledger(self) -> None:
        """Close books that are kept elsewhere than `[ledger]` says now, so that they are opened there.

        Raises:
            RetryError: runs with models are alive, whose budgets stand in the old ones.
        """
        if self._store is None or self._store.books is None or self._store.database == self._settings().database:
            return
        if self._callers:
            raise RetryError(
                "ledger-changed", "the policy names another ledger since, and living runs are counted in the old one",
                where=f".ledger.database; running: {', '.join(sorted(self._callers))}", remedy="cloister stop RUN",
            )  # fmt: skip
        calls, store = self._calls, self._store
        self._calls = self._store = None
        if calls is not None:
            await calls.close()
        await asyncio.get_running_loop().run_in_executor(None, store.close)

    def serve(
        self, run: ActiveRun, prepared: Prepared, called: Callable[[ActiveRun, Row], None]
    ) -> Callable[[Exchange], None]:
        """Return what serves the model traffic of a run that was opened."""
        from cloister.relay.llm.entry import handle, of_run

        assert self._calls is not None  # noqa: S101 - opened before
        name = prepared.plan.run
        caller = self._callers[name]
        caller.record = run.write_event
        caller.called = partial(called, run)
        caller.ask = partial(_ask, run)
        caller.account.listen(name, partial(self._alert, run))
        self._recordings.obey(run, caller, wanted=prepared.agent.llm.record)
        return partial(handle, self._calls.inference, of_run(lambda: caller))

    def uses(self, run: str, reference: str) -> bool:
        """Say whether a run's providers have this secret as a key."""
        return reference in self._secrets.get(run, ())

    def placeholders(self, run: str) -> dict[str, str]:
        """Return a run's key variables, for further commands in it."""
        return self._placeholders.get(run, {})

    def reload(self, run: ActiveRun, llm: Llm, policy: Policy) -> None:
        """Put a new policy in force for a living run.

        Raises:
            CloisterError: it names a provider or a login that is not there, or asks for a record that cannot be
                sealed; nothing is changed then.
        """
        caller = self._callers.get(run.plan.run)
        if self._calls is None or caller is None:
            return
        if llm.record:
            self._recordings.unlock()
        self._calls.update(caller, llm, policy)
        self._secrets[run.plan.run] = _references(llm, policy)
        self._recordings.obey(run, caller, wanted=llm.record)

    async def used(self, run: str, agent: str, user: str, since: float) -> ModelUse | None:
        """Return what the calls of a run used since it started; None where the ledger cannot be asked.

        Asked in a thread of its own: the ledger may be on another host.
        """
        books = self._store.books if self._store is not None else None
        if books is None:
            return None
        ask = partial(books.spent, agent, since - 1, float("inf"), run, user)
        try:
            spent = await asyncio.get_running_loop().run_in_executor(None, ask)
        except RetryError:
            return None
        return ModelUse(calls=spent.requests, tokens=spent.tokens, cost_usd=spent.cost_usd)

    def left(self, run: str) -> tuple[str, ...]:
        """A run is over: its placeholder opens nothing any more. Returns what its receipt says."""
        caller = self._callers.pop(run, None)
        self._placeholders.pop(run, None)
        self._secrets.pop(run, None)
        if caller is not None and self._calls is not None:
            self._calls.left(caller)
        refusals = caller.refusals.items() if caller is not None else ()
        refused = (f"model calls, {count} refused: {reason} [model-refused]" for reason, count in refusals)
        return (*self._notices.pop(run, ()), *refused, *self._recordings.left(run))

    async def close(self) -> None:
        """End calls under way, and the books."""
        if self._calls is not None:
            await self._calls.close()
        self._recordings.close()
        if self._store is not None:
            self._store.close()

    def obey_blocks(self) -> int:
        """Obey the kill switch as it is now; return how many calls under way were ended."""
        return 0 if self._calls is None else self._calls.obey_blocks()

    def metrics(self) -> Told | None:
        """Return the numbers of model calls; None where none was made."""
        if self._calls is None or self._store is None or self._store.books is None:
            return None
        return self._store.books.tell(self._calls.budget_shares())

    def _alert(self, run: ActiveRun, alert: Alert) -> None:
        """Record that a share of a budget was passed, and say it in the receipt."""
        from cloister.runs.model_calls import alert_fields

        run.write_event("budget-alert", alert_fields(alert))
        unit = "USD" if alert.reason.startswith("cost-") else "tokens"
        used = f"{alert.used:.2f}" if unit == "USD" else f"{alert.used:.0f}"
        words = f"{alert.percent} % of {alert.reason.replace('-', '_')} used: {used} of {alert.limit:g} {unit}"
        self._notices.setdefault(run.plan.run, []).append(f"{words} [budget-alert]")


def _references(llm: Llm, policy: Policy) -> frozenset[str]:
    """Return the secret references of an agent's providers."""
    return frozenset(policy.providers[name].key for name in llm.providers)


async def _ask(run: ActiveRun, refusal: Refusal) -> bool:
    """Ask the person at the terminal whether a budget that is used up is granted once more."""
    if not run.plan.launch.pty:
        return False
    from cloister.runs.questions import ask_letter

    async with run.asking:
        budget = refusal.reason.replace("-", "_")
        text = f"cloister: {run.plan.agent} has used up {budget}\n  grant the same amount once more? [y/N] "
        letter = await ask_letter(run, text, "ynYN", "n")
    run.write_event("answer", {"budget": refusal.reason, "answer": "granted" if letter in "yY" else "refused"})
    return letter in ("y", "Y")
