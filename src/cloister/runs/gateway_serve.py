"""What the system's broker keeps for gateways: for each one a socket for egress and models, open while the broker runs.

A gateway is a run whose process systemd starts and ends, by a unit file; nobody asks for it, and no channel of the
shim comes here. So it has a plan and records, credentials, identity tokens and budgets as other runs of units do, but
no end of its own: a record reaches from one start of the broker to its end. What the unit reads (`service_units`)
stands below `services/GATEWAY` of the broker's runtime directory: `box/`, `model-key`, `environment`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import msgspec

from cloister.egress.addresses import Guard
from cloister.egress.rules import Ruleset
from cloister.errors import CloisterError, StepError
from cloister.host import apply as host_apply
from cloister.host.frames import Frame
from cloister.host.owner import Owner
from cloister.host.systemd_version import systemd_version
from cloister.host.trust_roots import system_bundle
from cloister.isolation.service_units import Owned
from cloister.plan.steps import Plan
from cloister.plan.unit import SYSTEM_FILE, Account, System
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.model import Agent, Llm, Policy
from cloister.policy.service_instances import Gateway
from cloister.runs.active import ActiveRun
from cloister.runs.audit_runs import LOST, RunAudit
from cloister.runs.channel_secrets import swapped, with_channels
from cloister.runs.compile_unit import UnitFacts, compile_unit
from cloister.runs.live import Outcome
from cloister.runs.openclaw_config import MODEL_KEY
from cloister.runs.paths import Paths
from cloister.runs.prepare import (
    SHIM,
    TOKEN_VARIABLE,
    Prepared,
    model_names,
    new_placeholders,
    protocols_of,
    with_model_words,
)
from cloister.runs.provisions import Provisions
from cloister.runs.request import RunRequest
from cloister.runs.service_files import active
from cloister.runs.store import Record, Store, new_id
from cloister.runs.unit_prepare import UnitKitchen, etc_copy, refuse_visible
from cloister.runs.upstream import upstream_proxy

CLOSE_S = 2.0


class Nobody:
    """In the place of both halves of the shim: what is said to it is not heard."""

    closed = False
    peer_pid = 0

    def send(self, kind: str, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Hear nothing."""

    def hear(self) -> None:
        """Have heard nothing."""

    def close(self) -> None:
        """Be gone already."""

    def rebind(self, on_frame: Callable[[Any, Frame], None], on_close: Callable[[Any], None]) -> None:
        """Have nothing to say to anybody."""

    def lend(self) -> int:
        """Have no descriptor."""
        raise StepError("gateway-detached", "a gateway has no terminal and takes no further commands")


class GatewayKitchen(UnitKitchen):
    """Prepares what the broker keeps for a gateway, from the system's policy alone."""

    def __init__(self, paths: Paths, owner: Owner) -> None:
        """Look at nothing yet."""
        super().__init__(paths, owner)
        self._joined: dict[str, str] = {}
        """Which gateway's a run is."""

    def prepare_gateway(self, gateway: Gateway, account: Account) -> Prepared:
        """Return everything that is served for a gateway.

        Raises:
            CloisterError: in all its kinds, before anything was changed.
        """
        self.policies.refuse_ignored()
        resolved = self.policies.resolve(gateway.settings.agent, "")
        agent, at, host = with_channels(resolved.agent, gateway), Owned(account.name), self.host()
        ruleset, guard = self._rules_for(agent.egress, resolved.name)
        run = new_id(time.time())
        facts = UnitFacts(
            run=run,
            agent_name=resolved.name,
            policy_digest=self.policies.digest,
            user=account.name,
            caller_uid=account.uid,
            account=account,
            systemd=systemd_version(),
            machine=platform.machine(),
            project_id="0" * 16,
            home=at.home,
            run_state=self.paths.run_state(run),
            run_runtime=f"{self.paths.runtime}/services/{gateway.joined}",
            shim=SHIM,
            etc_directory=etc_copy(account),
            merged_usr=host.root_links.get("bin") == "usr/bin",
            directory=at.workspace,
            layout=WorkspaceLayout(root=at.workspace, mounts=(), placeholders=()),
            landlock_abi=host.landlock_abi,
            trust_roots=system_bundle() if agent.credentials else "",
            protocols=protocols_of(agent, resolved.policy),
            models=model_names(agent.llm),
        )
        facts = with_model_words(facts, agent, resolved)
        plan = compile_unit(agent, resolved.preset, agent.command, tuple(ruleset.allow.describe()), facts)
        refuse_visible(plan, at.home)
        self._joined[run] = gateway.joined
        placeholders = new_placeholders(facts.protocols, resolved.preset, agent)
        return Prepared(
            plan, agent, ruleset, guard, {}, (), resolved.preset.key_environment, host, facts.layout, resolved.policy,
            placeholders, user=account.name,
        )  # fmt: skip

    def now_for(self, plan: Plan) -> tuple[Agent, tuple[Ruleset, Guard]]:  # type: ignore[explicit-override]  # Python 3.12
        """Return what holds now for a gateway."""
        agent = self.policies.resolve(plan.agent, "").agent
        for gateway in active(self.policies.document()):
            if gateway.joined == self._joined.get(plan.run):
                agent = with_channels(agent, gateway)
        return agent, self._rules_for(agent.egress, plan.agent)

    def models_of(self, plan: Plan) -> tuple[Llm, Policy]:  # type: ignore[explicit-override]  # Python 3.12
        """Return the `llm` table and the policy that hold now for a gateway."""
        resolved = self.policies.resolve(plan.agent, "")
        return resolved.agent.llm, resolved.policy


class Gateways:
    """All gateways of one broker."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, kitchen: GatewayKitchen, provisions: Provisions, audit: RunAudit
    ) -> None:
        """Serve none yet; `provisions` and `audit` are those of the broker's other runs."""
        self._loop, self._kitchen, self._provisions, self._audit = loop, kitchen, provisions, audit
        self._store = Store(kitchen.paths.runs)
        self._served: dict[str, ActiveRun] = {}
        self._handed: dict[str, tuple[str, ...]] = {}
        """What each one's unit reads of us, by gateway."""

    @property
    def busy(self) -> bool:
        """Whether any is served."""
        return bool(self._served)

    async def serve(self) -> list[str]:
        """Serve those of the policy as it is now, and no others; return what cannot be served, in words."""
        complaints = []
        if self._audit.stops:
            await self.close()
            return [f"gateways are served when what they do can be recorded again: {self._audit.trouble}"]
        accounts = {account.service: account for account in _accounts() if account.service}
        wanted = {gateway.joined: gateway for gateway in active(self._kitchen.policies.document())}
        for joined in [name for name in self._served if name not in wanted]:
            await self._end(joined)
        for joined, gateway in wanted.items():
            try:
                if joined in self._served and self._other_secrets(gateway):
                    await self._end(joined)  # placeholders are made at the start: its unit has to read others anyway
                if joined in self._served:
                    self._provisions.reload(self._served[joined], self._kitchen)
                elif joined in accounts:
                    self._served[joined] = await self._start(gateway, accounts[joined])
            except (CloisterError, OSError) as error:
                complaints.append(f"gateway {gateway.label}: {error}")
        return complaints

    def _other_secrets(self, gateway: Gateway) -> bool:
        return {*swapped(gateway.settings)} != {*self._handed.get(gateway.joined, ())} - {MODEL_KEY, "environment"}

    async def _start(self, gateway: Gateway, account: Account) -> ActiveRun:
        prepared = self._kitchen.prepare_gateway(gateway, account)
        plan, started = prepared.plan, time.time()
        os.makedirs(f"{self._kitchen.paths.runtime}/services", mode=0o700, exist_ok=True)
        request = RunRequest(agent=plan.agent, environment=dict(os.environ))
        provided = await self._provisions.open(prepared, request, started)
        record = Record(
            id=plan.run, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
            started=started, broker_pid=os.getpid(), detached=True, user=account.name,
        )  # fmt: skip
        self._store.create(plan, record)
        try:
            applied = self._provisions.apply(provided, plan)
        except BaseException:
            await self._provisions.withdraw(provided, plan)
            self._store.remove(plan.run)
            raise
        words: dict[str, object] = {"gateway": gateway.label, "kernel": prepared.host.kernel}
        run = ActiveRun(plan, record, self._store, (Nobody(), Nobody()), self._loop.call_later, _not_ended, words)
        run.endless = True
        self._audit.began(run, self._kitchen.policies.digest, "", account.name)
        self._provisions.attach(provided, run)
        upstream = upstream_proxy(prepared.agent.egress.upstream_proxy, os.environ)
        await self._provisions.serve(run, prepared, applied, upstream)
        run.live.running()
        self._hand_over(gateway, prepared, run)
        return run

    def _hand_over(self, gateway: Gateway, prepared: Prepared, run: ActiveRun) -> None:
        """Leave for systemd, which is root, what the unit shall have: placeholders, worth nothing elsewhere."""
        directory = f"{self._kitchen.paths.runtime}/services/{gateway.joined}"
        texts = {MODEL_KEY: prepared.placeholders.get(TOKEN_VARIABLE, "")}
        texts["environment"] = "".join(f"{name}={value}\n" for name, value in run.placeholders.items())
        if run.credentials:
            made = run.credentials.placeholders
            texts |= {name: made[name].token for name in swapped(gateway.settings)}
        for name, text in texts.items():
            _write(f"{directory}/{name}", text)
        self._handed[gateway.joined] = tuple(texts)

    async def _end(self, joined: str) -> None:
        run = self._served.pop(joined)
        warnings = await self._provisions.end(run)
        try:
            if run.egress:
                await asyncio.wait_for(run.egress.close(), CLOSE_S)
        except TimeoutError:
            run.write_event("warning", {"what": "egress connections did not close in time"})
        finally:
            for name in self._handed.pop(joined, ()):
                _remove(f"{self._kitchen.paths.runtime}/services/{joined}/{name}")
            host_apply.undo(run.plan, self._kitchen.paths.state)
        ended = Outcome(0, LOST if self._audit.stops else "broker-ended")
        self._audit.over(run, run.conclude(ended, (*self._provisions.left(run.plan.run), *warnings)))

    async def close(self) -> None:
        """Serve none any more."""
        for joined in list(self._served):
            await self._end(joined)


def _accounts() -> tuple[Account, ...]:
    """Return the accounts that `cloister apply` has made; none where it was never typed."""
    try:
        with open(SYSTEM_FILE, "rb") as file:
            return msgspec.json.decode(file.read(), type=System).accounts
    except (OSError, msgspec.DecodeError):
        return ()


def _not_ended(run: ActiveRun, outcome: Outcome) -> None:
    """A gateway's record ends with the broker only."""


def _write(path: str, text: str) -> None:
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
