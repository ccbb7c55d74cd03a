"""The models of living runs: which run is which caller, from its start to its end. What the supervisor talks to.

Nothing of the proxy, its books or its database is imported before the first run that has models.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cloister.host.owner import Owner
from cloister.policy.model import Ledger, Llm, Policy
from cloister.runs.paths import Paths

if TYPE_CHECKING:
    from cloister.llm.budgets import Alert
    from cloister.llm.errors import Refusal
    from cloister.relay.exchange import Exchange
    from cloister.relay.llm.service import Caller
    from cloister.runs.active import ActiveRun
    from cloister.runs.identity_store import IdentityStore
    from cloister.runs.model_calls import ModelCalls
    from cloister.runs.model_store import Store
    from cloister.runs.prepare import Prepared
    from cloister.runs.recordings import Recorder

JOIN_S = 5.0
"""How long the broker's end waits for what of a recording is not written yet."""


class RunModels:
    """The callers among the runs of one broker."""

    def __init__(self, paths: Paths, owner: Owner, identities: Callable[[], IdentityStore]) -> None:
        """Open nothing yet; `identities` opens the key store, for runs whose calls are recorded."""
        self._paths, self._owner, self._identities = paths, owner, identities
        self._wrapping = b""
        self._recorders: dict[str, Recorder] = {}
        self._ended: list[Recorder] = []
        self._calls: ModelCalls | None = None
        self._store: Store | None = None
        self._ledger = Ledger()
        self._callers: dict[str, Caller] = {}
        self._placeholders: dict[str, dict[str, str]] = {}
        self._notices: dict[str, list[str]] = {}

    def open(self, prepared: Prepared) -> None:
        """Make sure that the calls of a run that has models can be served and written down, before it starts.

        Raises:
            CloisterError: a provider is missing, or the books or prices cannot be opened.
        """
        if not prepared.placeholders:
            return
        self._ledger = prepared.policy.ledger
        if self._calls is None:
            from cloister.runs.model_blocks import blocked
            from cloister.runs.model_calls import ModelCalls
            from cloister.runs.model_store import Store, every_second, secret_reader
            from cloister.runs.price_list import PriceFiles

            prices = PriceFiles(self._paths, self._owner.uid)
            self._store = Store(self._paths, self._owner, lambda: self._ledger)
            reader = partial(secret_reader, self._paths, self._owner, dict(os.environ))
            blocks = partial(blocked, self._paths.blocked)
            self._calls = ModelCalls(self._store, every_second(prices.current), reader, blocks)
        run, agent = prepared.plan.run, prepared.plan.agent
        token = next(iter(prepared.placeholders.values()))
        self._callers[run] = self._calls.caller(
            run, agent, self._owner.name, prepared.agent.llm, prepared.policy, token=token
        )
        self._placeholders[run] = prepared.placeholders
        self._notices[run] = []

    def unlock(self) -> None:
        """Have the key ready with which recordings are sealed. May wait for the key store, so in a thread.

        Raises:
            CloisterError: the key store cannot be opened.
        """
        if not self._wrapping:
            from cloister.llm.recording import PURPOSE

            self._wrapping = self._identities().derive(PURPOSE)

    def serve(self, run: ActiveRun, prepared: Prepared) -> Callable[[Exchange], None]:
        """Return what serves the model traffic of a run that was opened."""
        from cloister.relay.llm.entry import handle, of_run

        assert self._calls is not None  # noqa: S101 - opened before
        name = prepared.plan.run
        caller = self._callers[name]
        caller.record = run.write_event
        caller.ask = partial(_ask, run)
        caller.account.listen(name, partial(self._alert, run))
        if prepared.agent.llm.record:
            self._record(run, caller)
        return partial(handle, self._calls.inference, of_run(lambda: caller))

    def placeholders(self, run: str) -> dict[str, str]:
        """Return a run's key variables, for further commands in it."""
        return self._placeholders.get(run, {})

    def reload(self, run: ActiveRun, llm: Llm, policy: Policy) -> None:
        """Put a new policy in force for a living run.

        Raises:
            CloisterError: it names a provider that is not there, or asks for a record that cannot be sealed; nothing
                is changed then.
        """
        caller = self._callers.get(run.plan.run)
        if self._calls is None or caller is None:
            return
        if llm.record:
            self.unlock()
        self._calls.update(caller, llm, policy)
        if not llm.record:
            caller.recorder = None
        elif caller.recorder is None:
            self._record(run, caller)

    def left(self, run: str) -> tuple[str, ...]:
        """A run is over: its placeholder opens nothing any more. Returns what its receipt says of budgets."""
        caller = self._callers.pop(run, None)
        self._placeholders.pop(run, None)
        if caller is not None and self._calls is not None:
            self._calls.left(caller)
        return (*self._notices.pop(run, ()), *self._end_recording(run))

    async def close(self) -> None:
        """End calls under way, and the books."""
        if self._calls is not None:
            await self._calls.close()
        for recorder in (*self._recorders.values(), *self._ended):
            recorder.finish()
            recorder.join(JOIN_S)
        if self._store is not None:
            self._store.close()

    def obey_blocks(self) -> int:
        """Obey the kill switch as it is now; return how many calls under way were ended."""
        return 0 if self._calls is None else self._calls.obey_blocks()

    def _record(self, run: ActiveRun, caller: Caller) -> None:
        """Write a run's calls down from now on; a record that the policy ended goes on in the same file."""
        from cloister.runs.recordings import FILE, Recorder

        name = run.plan.run
        if name not in self._recorders:
            path = f"{os.path.dirname(run.store.events_path(name))}/{FILE}"
            soon = asyncio.get_running_loop().call_soon_threadsafe
            self._recorders[name] = Recorder(path, name, self._wrapping, run.write_event, soon)
        caller.recorder = self._recorders[name]
        run.write_event("recording", {"file": FILE})

    def _end_recording(self, run: str) -> tuple[str, ...]:
        """Close a run's record behind its last call; return what its receipt says."""
        recorder = self._recorders.pop(run, None)
        if recorder is None:
            return ()
        recorder.finish()
        self._ended = [one for one in self._ended if one.alive]
        self._ended.append(recorder)
        return recorder.summary()

    def _alert(self, run: ActiveRun, alert: Alert) -> None:
        """Record that a share of a budget was passed, and say it in the receipt."""
        from cloister.runs.model_calls import alert_fields

        run.write_event("budget-alert", alert_fields(alert))
        unit = "USD" if alert.reason.startswith("cost-") else "tokens"
        used = f"{alert.used:.2f}" if unit == "USD" else f"{alert.used:.0f}"
        words = f"{alert.percent} % of {alert.reason.replace('-', '_')} used: {used} of {alert.limit:g} {unit}"
        self._notices.setdefault(run.plan.run, []).append(f"{words} [budget-alert]")


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
