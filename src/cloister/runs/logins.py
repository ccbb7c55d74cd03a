"""The owner of logins in the broker: gives access tokens to runs, and sees that they are renewed in time.

One renewal at a time per login, however many runs wait for it; the lock of the store makes that one among
processes. A token that is due is renewed beside the traffic that still uses it; only an expired one makes
anybody wait. What fails is asked again with growing pauses, never in a storm: until then a token that is
still good is used, and without one the reason is told at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from cloister.credentials import logins as kept_logins
from cloister.credentials.logins import Description, Kept
from cloister.errors import CloisterError, RetryError, StepError
from cloister.host.logins import Shelf, Stamp, unknown
from cloister.runs.login_files import load
from cloister.runs.login_renewal import Clock, Post, RenewalError, Renewals, expired, poster

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0
_MONOTONIC_SLACK_S = 60.0


class LoginEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a login, for the record; no token is in it."""

    login: str
    what: Literal["renewed", "not-renewed", "ended"]
    reason: str = ""
    """The reference of the error, for what went wrong."""


def _ignore(_event: LoginEvent) -> None:
    """Record nothing."""


class _Loaded:
    """A login as it was read, and what this process knows beyond the file."""

    def __init__(self, kept: Kept, stamp: Stamp | None, deadline: float) -> None:
        self.kept = kept
        self.stamp = stamp
        self.deadline = deadline
        """Monotonic time at which the access token ends, whatever is done to the clock meanwhile."""


class _Pause:
    """How long nothing is asked after a failure."""

    def __init__(self) -> None:
        self.failures = 0
        self.until = 0.0
        self.error: CloisterError | None = None


class Logins:
    """All logins of one user, for the broker's event loop. Not thread-safe."""

    def __init__(
        self,
        directory: str,
        *,
        send: Post | None = None,
        record: Callable[[LoginEvent], None] = _ignore,
        now: Clock = time.time,
        monotonic: Clock = time.monotonic,
    ) -> None:
        """Read nothing yet.

        Args:
            directory: of the store (`Paths.logins`).
            send: the way to providers (`login_renewal.poster`); direct, when left out.
            record: gets events.
            now: seconds since the epoch.
            monotonic: seconds that no clock step changes.
        """
        self._shelf = Shelf(directory)
        self._renewals = Renewals(self._shelf, send or poster({}), now)
        self._record = record
        self._now = now
        self._monotonic = monotonic
        self._jitter = random.random()  # noqa: S311  # spreads load, guards nothing
        self._loaded: dict[str, _Loaded] = {}
        self._under_way: dict[str, asyncio.Task[Kept]] = {}
        self._pauses: dict[str, _Pause] = {}
        self._refused: set[str] = set()

    async def access_token(self, name: str) -> str:
        """Return an access token that is good now.

        Raises:
            CloisterError: `login-unknown`, `login-expired`, `login-refused`, `login-not-renewed`, or the store's.
        """
        loaded = self._load(name)
        state = self._judge(loaded)
        if state == "ended":
            raise expired(loaded.kept)
        if state == "due" and self._may_ask(name):
            self._renew(loaded.kept)
        if state == "expired":
            return (await self._renewed(loaded.kept)).access_token
        if name in self._refused:  # a host has said 401 to this one, and another is on its way
            await asyncio.wait([self._under_way[name]])
            return await self.access_token(name)  # the new one, the old one in passing trouble, or that it has ended
        return loaded.kept.access_token

    async def renew(self, name: str, refused: str) -> str:
        """Return the access token to try once more with, after a host that is bound to it answered 401.

        It is the same one when renewing would not help: it has only just been renewed for that reason.

        Args:
            name: which login.
            refused: the access token that was sent.

        Raises:
            CloisterError: as `access_token`.
        """
        loaded = self._load(name)
        if loaded.kept.ended:
            raise expired(loaded.kept)
        if loaded.kept.access_token != refused or not kept_logins.may_force(loaded.kept, self._now()):
            return loaded.kept.access_token
        return (await self._renewed(loaded.kept, forced=True)).access_token

    def refused(self, name: str, token: str) -> None:
        """Begin what `renew` does, and do not wait; whoever asks for a token meanwhile waits for the new one."""
        try:
            kept = self._load(name).kept
        except CloisterError:
            return
        if kept.access_token == token and kept_logins.may_force(kept, self._now()) and self._may_ask(name):
            self._refused.add(name)
            self._renew(kept, forced=True)

    def describe(self, name: str) -> Description:
        """Return what may be known of a login.

        Raises:
            CloisterError: there is none of that name, or its file cannot be trusted.
        """
        return kept_logins.describe(self._load(name).kept, self._now())

    def names(self) -> list[str]:
        """Return the names of all logins."""
        return self._shelf.names()

    async def close(self) -> None:
        """Wait for renewals under way: an answer that nobody stores is a login lost."""
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()))

    def _load(self, name: str) -> _Loaded:
        """Return a login, read again when its file has changed: by another process, or by `cloister logout`."""
        stamp = self._shelf.stamp(name)
        loaded = self._loaded.get(name)
        if stamp is None:
            self._loaded.pop(name, None)
            raise unknown(name)
        if loaded is None or loaded.stamp != stamp:
            loaded = self._keep(name, load(self._shelf, name), stamp)
        return loaded

    def _keep(self, name: str, kept: Kept, stamp: Stamp | None) -> _Loaded:
        before = self._loaded.get(name)
        if before is None or before.kept.made != kept.made:
            self._pauses.pop(name, None)  # a new login: what failed before says nothing
        left = float("inf") if kept.expires is None else min(kept.expires - self._now(), kept.expires - kept.issued)
        deadline = self._monotonic() + left
        if before is not None and before.kept.access_token == kept.access_token:
            deadline = min(deadline, before.deadline)
        loaded = self._loaded[name] = _Loaded(kept, stamp, deadline)
        return loaded

    def _judge(self, loaded: _Loaded) -> kept_logins.State:
        """Judge by both clocks: one may have been set, the other stands still while the machine sleeps."""
        state = kept_logins.judge(loaded.kept, self._now(), self._jitter)
        if state in ("good", "due") and self._monotonic() >= loaded.deadline:
            return "expired"
        if state == "good" and loaded.kept.expires is not None and loaded.kept.refresh_token:
            lifetime = loaded.kept.expires - loaded.kept.issued
            soon = loaded.deadline - self._monotonic() < min(_MONOTONIC_SLACK_S, lifetime / 20)
            return "due" if soon and loaded.kept.renewing is None else "good"
        return state

    def _may_ask(self, name: str) -> bool:
        pause = self._pauses.get(name)
        return name not in self._under_way and (pause is None or self._monotonic() >= pause.until)

    async def _renewed(self, kept: Kept, *, forced: bool = False) -> Kept:
        """Wait for a renewal, a new one or that under way; within a pause, tell the last reason instead."""
        pause = self._pauses.get(kept.name)
        if kept.name not in self._under_way and pause and pause.error and self._monotonic() < pause.until:
            raise pause.error.with_traceback(None)
        # A caller that goes away must not take the renewal with it: its answer has to be stored.
        return await asyncio.shield(self._renew(kept, forced=forced))

    def _renew(self, kept: Kept, *, forced: bool = False) -> asyncio.Task[Kept]:
        name = kept.name
        task = self._under_way.get(name)
        if task is None:
            task = self._under_way[name] = asyncio.create_task(self._renew_in_thread(name, kept.access_token, forced))
            task.add_done_callback(lambda done: self._settle(name, done))
        return task

    async def _renew_in_thread(self, name: str, replacing: str, forced: bool) -> Kept:
        try:
            kept = await asyncio.to_thread(self._renewals.renew, name, replacing, forced=forced)
        except RenewalError as trouble:
            self._failed(name, trouble.error, trouble.retry_after_s)
            raise trouble.error from None
        except CloisterError as error:
            self._failed(name, error, 0.0)
            raise
        self._pauses.pop(name, None)
        before = self._loaded.get(name)
        self._keep(name, kept, self._shelf.stamp(name))
        if before is None or before.kept.access_token != kept.access_token:
            self._record(LoginEvent(login=name, what="renewed"))
        return kept

    def _failed(self, name: str, error: CloisterError, retry_after_s: float) -> None:
        pause = self._pauses.setdefault(name, _Pause())
        growing = min(_FIRST_PAUSE_S * 2.0**pause.failures, _LONGEST_PAUSE_S) * (1.0 + self._jitter / 4)
        passing = isinstance(error, RetryError | StepError)
        wait_s = growing if passing else _LONGEST_PAUSE_S
        pause.failures = min(pause.failures + 1, 16)
        pause.until = self._monotonic() + max(wait_s, min(retry_after_s, _LONGEST_PAUSE_S))
        pause.error = error
        what: Literal["not-renewed", "ended"] = "ended" if error.reference == "login-expired" else "not-renewed"
        self._record(LoginEvent(login=name, what=what, reason=error.reference))

    def _settle(self, name: str, done: asyncio.Task[Kept]) -> None:
        self._under_way.pop(name, None)
        self._refused.discard(name)
        if not done.cancelled():
            done.exception()  # seen: whoever waits gets it as well, and nobody has to wait
