"""Identity tokens of living runs: written before the agent starts, renewed while it lives, void when it ends.

    admit (may it have them?) ──▶ begin (files) ──▶ tick, every 5 s ──▶ end (revoked)
                                       narrow (policy reloaded) ──┘

A file is replaced by rename, after a third of its token's life or when the token does not verify
any more (its key was revoked, the clock was set back). Nothing of this runs, and nothing heavy
is imported, before the first run whose policy names audiences.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import CloisterError, DeniedError, StepError
from cloister.plan.steps import IdentityTokens, Plan
from cloister.policy.model import Identity
from cloister.policy.units import parse_duration
from cloister.runs.identity_files import INDEX, OWN, file_name

if TYPE_CHECKING:
    from cloister.identity.authority import Grant
    from cloister.runs.identity_store import IdentityStore

TICK_S = 5.0
SHARE = 3
"""A token is replaced after one part in three of its life: what the agent reads is good for two thirds at least."""
MASTER_KEY = "CLOISTER_MASTER_KEY"
Note = Callable[[str, dict[str, object]], None]


def tokens_of(plan: Plan) -> IdentityTokens | None:
    """Return the step that says which tokens a run has, if it has any."""
    return next((step for step in plan.steps if isinstance(step, IdentityTokens)), None)


def grant_of(plan: Plan, since: float) -> Grant | None:
    """Return what the plan of a run gives it; None for a run without tokens.

    Args:
        plan: as stored before the run began.
        since: when it began, in seconds since the epoch.
    """
    step = tokens_of(plan)
    if step is None:
        return None
    from cloister.identity.authority import Grant

    return Grant(
        agent=plan.agent, run=plan.run, user=step.user, policy=plan.policy_digest, audiences=step.audiences,
        lifetime_s=step.lifetime_s, since=since,
    )  # fmt: skip


class _Held(msgspec.Struct, frozen=True):
    """The token in one file. Its `repr` shows the name only."""

    jti: str
    token: str
    issued: float

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return f"_Held({self.jti!r})"


class RunTokens:
    """The tokens of one run."""

    def __init__(self, store: IdentityStore, step: IdentityTokens, grant: Grant) -> None:
        """Take the store, and what the run may have; write nothing."""
        self.grant = grant
        self._store = store
        self._directory = step.directory
        self._mode = step.mode
        self._aside = f"{os.path.dirname(os.path.dirname(step.directory))}/token.new"
        self.note: Note = lambda _kind, _fields: None
        """Writes an event of the run."""
        self._held: dict[str, _Held] = {}
        self._out: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self.ended = False

    def prepare(self) -> None:
        """Have every token issued; raises what the store raises, before anything else is done for the run."""
        for audience in (OWN, *self.grant.audiences):
            self._issue(audience)

    def tell(self, note: Note) -> None:
        """Write events of the run from here on, first of the tokens it has."""
        self.note = note
        for audience, held in self._held.items():
            self._note_issued(audience, held.jti)

    def _note_issued(self, audience: str, jti: str) -> None:
        self.note("identity-issued", {"audience": audience, "token": jti})

    def write(self) -> None:
        """Put all tokens into their files.

        Raises:
            StepError: the system refused.
        """
        try:
            for audience, held in self._held.items():
                self._put(file_name(audience), held.token)
            self._put(INDEX, self._index())
        except OSError as error:
            raise StepError(
                "tokens-not-written", f"the identity tokens could not be written: {error.strerror}",
                where=self._directory,
            ) from error  # fmt: skip

    def renew(self, now: float) -> None:
        """Replace what has lived for a third of its time, or does not verify any more."""
        with self._lock:
            if not self.ended:
                self._renew(now)

    def _renew(self, now: float) -> None:
        try:
            for audience, held in list(self._held.items()):
                aged = not held.issued - 1 <= now < held.issued + self.grant.lifetime_s / SHARE
                if aged or not self._still_good(audience, held):
                    self._issue(audience)
                    self._put(file_name(audience), self._held[audience].token)
        except DeniedError as error:
            self._stop(error)
        except (CloisterError, OSError) as error:
            self.note("warning", {"what": f"identity tokens were not renewed: {error}"})

    def narrow(self, identity: Identity, digest: str) -> None:
        """Obey a policy that was loaded since: audiences can go, not come; tokens name the new policy at once.

        Raises:
            CloisterError: the store refused; the files are as they were.
        """
        with self._lock:
            if self.ended:
                return
            if identity.audiences:
                self._narrow(identity, digest)
                return
            self._stop(DeniedError("audience-not-granted", "the policy names no audience any more"))
            self._store.revoke_run(self.grant.run, self.grant.agent)

    def _narrow(self, identity: Identity, digest: str) -> None:
        lifetime_s = int(parse_duration(identity.lifetime))
        self.grant = self.grant.narrowed(identity.audiences, lifetime_s, digest)
        kept = (OWN, *self.grant.audiences)
        void = [jti for audience, jtis in self._out.items() if audience not in kept for jti in jtis]
        if void:
            self._store.revoke_tokens(tuple(void), self.grant.agent)
        for audience in [name for name in self._held if name not in kept]:
            del self._held[audience], self._out[audience]
            self._remove(file_name(audience))
        for audience in kept:
            self._issue(audience)
        self.write()

    def end(self) -> None:
        """Make every token void: the run is over.

        Raises:
            CloisterError: the store could not be written.
        """
        with self._lock:  # a renewal under way ends first; none comes after
            self.ended = True
        self._store.revoke_run(self.grant.run, self.grant.agent, ended=True)

    def _issue(self, audience: str) -> None:
        now = time.time()
        token, jti = self._store.issue(self.grant, audience)
        self._held[audience] = _Held(jti, token, now)
        self._note_issued(audience, jti)
        out = self._out.setdefault(audience, [])
        out.append(jti)
        del out[: -2 * SHARE]  # a token before these has expired

    def _still_good(self, audience: str, held: _Held) -> bool:
        from cloister.identity.authority import Demand
        from cloister.identity.tokens import TokenError

        try:
            self._store.verify(held.token, Demand(audience=audience, run=self.grant.run))
        except TokenError:
            return False
        return True

    def _stop(self, error: CloisterError) -> None:
        """Take the tokens away: the run or its agent was revoked, or its policy gives it none any more."""
        self.ended = True
        for name in (*map(file_name, self._held), INDEX):
            self._remove(name)
        self._held.clear()
        self.note("identity-ended", {"reason": error.reference, "what": error.message})

    def _index(self) -> str:
        files = {audience: file_name(audience) for audience in self._held}
        return msgspec.json.encode(files).decode()

    def _put(self, name: str, text: str) -> None:
        """Replace a file. The new one is made where the sandbox does not look, so it is never seen half-written."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._aside)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._aside, flags, 0o400)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(descriptor, self._mode)
        os.rename(self._aside, f"{self._directory}/{name}")

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._directory}/{name}")


class Identities:
    """The tokens of all runs of one broker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, state: str) -> None:
        """Take the master key out of the environment, which programs that the broker starts would inherit."""
        self._loop = loop
        self._directory = f"{state}/identity"
        master = os.environ.pop(MASTER_KEY, "")
        self._own = {MASTER_KEY: master} if master else {}
        self._store: IdentityStore | None = None
        self._runs: dict[str, RunTokens] = {}
        self._timer: asyncio.TimerHandle | None = None

    def store(self) -> IdentityStore:
        """Return the store; the first call imports cryptography."""
        if self._store is None:
            from cloister.runs.identity_store import IdentityStore

            self._store = IdentityStore(self._directory, {**os.environ, **self._own}, hostname=socket.gethostname())
        return self._store

    async def admit(self, plan: Plan, since: float) -> RunTokens | None:
        """Have a run's first tokens issued, before anything is done for it; None for a run that has none.

        Raises:
            CloisterError: the key store cannot be opened, or the agent was revoked.
        """
        step, grant = tokens_of(plan), grant_of(plan, since)
        if step is None or grant is None:
            return None
        tokens = RunTokens(self.store(), step, grant)
        await self._loop.run_in_executor(None, tokens.prepare)
        return tokens

    def begin(self, tokens: RunTokens) -> None:
        """Write a run's tokens and keep them fresh.

        Raises:
            StepError: the system refused.
        """
        tokens.write()
        self._runs[tokens.grant.run] = tokens
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def narrow(self, run: str, identity: Identity, digest: str) -> None:
        """Obey a reloaded policy.

        Raises:
            CloisterError: the store refused.
        """
        if tokens := self._runs.get(run):
            tokens.narrow(identity, digest)

    async def end(self, run: str) -> str:
        """Make a run's tokens void; return what went wrong, for the receipt."""
        tokens = self._runs.pop(run, None)
        if tokens is None:
            return ""
        try:
            await self._loop.run_in_executor(None, tokens.end)
        except CloisterError as error:
            return f"identity tokens were not revoked, they expire by themselves: {error.message}"
        return ""

    def recover(self, plan: Plan) -> None:
        """Make void what a killed broker's run has left; where that cannot be, it expires by itself."""
        if tokens_of(plan) is None:
            return
        with contextlib.suppress(CloisterError):
            self.store().revoke_run(plan.run, plan.agent, ended=True)

    def _tick(self) -> None:
        self._timer = None
        if self._runs:
            self._loop.run_in_executor(None, self._renew_all, list(self._runs.values())).add_done_callback(self._ticked)

    def _ticked(self, done: asyncio.Future[None]) -> None:
        if self._runs:
            self._timer = self._loop.call_later(TICK_S, self._tick)
        if not done.cancelled() and (error := done.exception()):
            self._loop.call_exception_handler({"message": "identity tokens were not renewed", "exception": error})

    @staticmethod
    def _renew_all(runs: list[RunTokens]) -> None:
        now = time.time()
        for tokens in runs:
            tokens.renew(now)
