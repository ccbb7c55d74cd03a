"""Reading secret references: the one place where real secrets come into the broker's memory.

    file:PATH        a file that only its owner may read; read at each use, so a new key counts at once.
                     To the system's broker systemd hands those of root's, as they were when it was started
    env:NAME         a variable of whoever started the run, else of the broker; it never changes during a run
    systemd:NAME     a credential of the broker's own unit (`$CREDENTIALS_DIRECTORY`)
    command:ARGV     what a command prints; no shell
    keyring:NAME     the desktop's keyring, service `cloister`; `keyring:SERVICE/NAME` for another one
    pass:NAME        the first line of `pass show NAME`
    login:NAME       a login that the broker keeps; its owner registers as a provider

What costs a process (`command`, `keyring`, `pass`) is kept for five minutes, or until its host
says 401. A reader belongs to one run. Errors name the reference and hold nothing of a secret.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from cloister.errors import RetryError
from cloister.host.secrets_commands import TIMEOUT_S, output_of, split
from cloister.host.secrets_files import UnavailableError, read_credential, read_private, without_newline
from cloister.plan.unit import delivered_name

KEPT_S = 300.0
"""How long the output of a command counts."""
ASK_AGAIN_S = 10.0
"""A host that answers 401 again and again does not start a command more often than this."""
_FILE_TIMEOUT_S = 10.0
_KEYRING_SERVICE = "cloister"

Provider = Callable[[str], Awaitable[bytes]]
"""Returns the secret for what follows the scheme; raises `CloisterError` when it cannot."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Whose references they are."""

    home: str
    uid: int
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """That of whoever started the run."""
    own: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The broker's own."""
    forbidden: tuple[str, ...] = ()
    """Directories that the agent can write: no file and no program is taken from there."""


@dataclass(frozen=True, slots=True)
class _Kept:
    value: bytes = field(repr=False)
    since: float


class SecretReader:
    """Reads the references of one run, one fetch at a time for each."""

    def __init__(
        self, surroundings: Surroundings, providers: Mapping[str, Provider] | None = None, *,
        refusals: Mapping[str, Callable[[str], None]] | None = None,
        timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Read nothing yet. `providers` add schemes, or take the place of ours; `refusals` are told of 401s."""
        self._refusals = dict(refusals or {})
        self._around = surroundings
        self._timeout_s = timeout_s
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._running: dict[str, asyncio.Task[bytes]] = {}
        ours: dict[str, Provider] = {
            "file": self._file, "env": self._env, "systemd": self._systemd, "command": self._command,
            "keyring": self._keyring, "pass": self._pass,
        }  # fmt: skip
        self._providers: dict[str, Provider] = ours | dict(providers or {})

    async def read(self, reference: str) -> bytes:
        """Return the secret as it is now.

        Raises:
            RetryError: `secret-unavailable`, with the reference and what to try.
        """
        kept = self._kept.get(reference)
        if kept is not None and self._clock() - kept.since < KEPT_S:
            return kept.value
        task = self._running.get(reference)
        if task is None:
            task = self._running[reference] = asyncio.get_running_loop().create_task(self._fetch(reference))
            task.add_done_callback(partial(self._fetched, reference))
        return await asyncio.shield(task)  # others may wait for the same one

    def refused(self, reference: str) -> None:
        """Ask anew at the next use: the bound host did not accept what was kept."""
        kept = self._kept.get(reference)
        if kept is not None and self._clock() - kept.since >= ASK_AGAIN_S:
            del self._kept[reference]
        scheme, _, target = reference.partition(":")
        if scheme in self._refusals:
            self._refusals[scheme](target)

    def forget(self) -> None:
        """Drop everything: the run is over."""
        self._kept.clear()
        for task in self._running.values():
            task.cancel()

    def _fetched(self, reference: str, task: asyncio.Task[bytes]) -> None:
        self._running.pop(reference, None)
        if not task.cancelled():
            task.exception()  # whoever waits sees it; nobody may be left

    async def _fetch(self, reference: str) -> bytes:
        scheme, _, target = reference.partition(":")
        provider = self._providers.get(scheme)
        if provider is None:
            raise _error(reference, f"nothing here knows references that begin with {scheme}:")
        try:
            value = await provider(target)
        except UnavailableError as error:
            raise _error(reference, error.why, error.remedy) from None
        if not value:
            raise _error(reference, "it is empty")
        if scheme in {"command", "keyring", "pass"}:
            self._kept[reference] = _Kept(value, self._clock())
        return value

    async def _file(self, target: str) -> bytes:
        path = self._around.home + target[1:] if target.startswith("~/") else target
        return without_newline(await self._in_thread(partial(self._read_file, path)))

    def _read_file(self, path: str) -> bytes:
        handed = self._around.own.get("CREDENTIALS_DIRECTORY", "")
        if handed and os.path.lexists(f"{handed}/{delivered_name(path)}"):
            return read_credential(handed, delivered_name(path))  # a file of root's
        return read_private(path, self._around.uid, forbidden=self._around.forbidden)

    async def _systemd(self, target: str) -> bytes:
        directory = self._around.own.get("CREDENTIALS_DIRECTORY", "")
        return without_newline(await self._in_thread(partial(read_credential, directory, target)))

    async def _in_thread(self, job: Callable[[], bytes]) -> bytes:
        """Read outside the event loop: a file on a network may hang."""
        try:
            async with asyncio.timeout(_FILE_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(None, job)
        except TimeoutError:
            raise UnavailableError(f"it could not be read within {_FILE_TIMEOUT_S:g} s") from None

    async def _env(self, target: str) -> bytes:
        for environment in (self._around.environment, self._around.own):
            if environment.get(target):
                return environment[target].encode("utf-8", "surrogateescape")
        raise UnavailableError(f"the variable {target} is not set", f"export {target}=...")

    async def _command(self, target: str) -> bytes:
        return without_newline(await self._run(split(target)))

    async def _pass(self, target: str) -> bytes:
        first, _, _ = (await self._run(["pass", "show", "--", target])).partition(b"\n")
        return first

    async def _keyring(self, target: str) -> bytes:
        """Ask in a process of its own: the library talks to D-Bus and may wait for a person."""
        if importlib.util.find_spec("keyring") is None:
            raise UnavailableError("the Python package keyring is not installed", "pip install 'cloister[keyring]'")
        service, slash, name = target.rpartition("/")
        words = [sys.executable, "-I", "-m", "keyring", "get", service if slash else _KEYRING_SERVICE, name]
        try:
            return without_newline(await self._run(words))
        except UnavailableError:
            remedy = f"keyring set {words[-2]} {words[-1]}"
            raise UnavailableError("the keyring has no such entry, or is locked", remedy) from None

    async def _run(self, words: list[str]) -> bytes:
        around = self._around
        environment = {**around.own, **around.environment} if not around.environment.get("PATH") else around.environment
        return await output_of(words, environment, forbidden=around.forbidden, timeout_s=self._timeout_s)


def _error(reference: str, why: str, remedy: str = "") -> RetryError:
    return RetryError("secret-unavailable", f"a secret cannot be had: {why}", where=reference, remedy=remedy)
