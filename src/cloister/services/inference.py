"""The inference proxy as a service of its own: TCP port 11435, callers known by virtual keys or identity tokens.

    python -m cloister.services.inference [--keys FILE] [--policy FILE] [--listen 127.0.0.1:11435]

FILE holds one line per key, `AGENT KEY`, and belongs to its owner alone (mode 0600). What an agent may do stands in
its `llm` table of the policy. Within a broker the same core serves runs through their own sockets (`runs`), which
needs no such keys. Both keep the books of their user, and there is one keeper only: whoever comes second is told.

The key of a line `@metrics KEY` opens `/metrics`, in the text format of Prometheus. SIGHUP reads policy, keys and
blocked agents again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cloister.errors import CloisterError, PolicyError, Problem, UsageError, render
from cloister.host.owner import Owner, identify
from cloister.host.secrets_memory import keep_memory_private
from cloister.policy.first_use import look_at_types
from cloister.relay.llm.listen import ModelServer
from cloister.runs.books import BookKeeper
from cloister.runs.identity import MASTER_KEY
from cloister.runs.identity_files import DIRECTORY
from cloister.runs.login_secrets import LoginSecrets
from cloister.runs.model_calls import PORT, ModelCalls
from cloister.runs.model_store import Store as Books
from cloister.runs.model_store import calls_of, say
from cloister.runs.paths import Paths, locate
from cloister.runs.policies import PolicyFiles, Source, read_trusted
from cloister.runs.store import Store
from cloister.services.inference_callers import Callers, Keys
from cloister.services.inference_metrics import MetricsPage

if TYPE_CHECKING:
    from cloister.runs.identity_store import IdentityStore
    from cloister.runs.logins import LoginEvent

_LOOK_S = 1.0
"""How often revoked identities are looked for while runs call by their tokens."""


class _Setting(NamedTuple):
    """What the command line and the environment say."""

    paths: Paths
    owner: Owner
    policy: str
    keys: str
    host: str
    port: int
    environment: Mapping[str, str]
    """That of the process as it began, master key included; programs that it starts get the rest."""

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Show no environment."""
        return f"_Setting({self.policy!r}, {self.keys!r}, {self.host!r}, {self.port})"


class Service:
    """The proxy, and the callers it knows."""

    def __init__(self, setting: _Setting, files: PolicyFiles, calls: ModelCalls, books: BookKeeper) -> None:
        """Read policy and keys.

        Raises:
            CloisterError: one of them is missing, wrong or not to be trusted.
        """
        self._setting, self._calls, self._books, self._page = setting, calls, books, MetricsPage(books, calls)
        identity = partial(_identity_store, setting.paths, setting.environment)
        store = Store(setting.paths.runs)
        self._callers = Callers(files, store, calls, setting.owner.name, identity=identity, say=say)
        self._load()

    def reload(self) -> None:
        """Read policy, keys and kill switch again; mistakes leave everything as it was."""
        try:
            self._load()
        except CloisterError as error:
            sys.stderr.write(render(error) + "\n")

    async def serve(self, ready: Callable[[int], None]) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reloads."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, over.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        server = ModelServer(self._calls.inference, self._callers.identify, other=self._page.serve)
        await self._callers.check_keys()
        self._books.gather(loop.call_soon)
        ready(await server.start(self._setting.host, self._setting.port))
        gc.freeze()  # what is loaded now stays: nothing of it needs to be looked through again
        gc.set_threshold(20_000, 20, 50)
        try:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), _LOOK_S)
                self._callers.obey_revocations()
        finally:
            await server.close()
            await self._calls.close()

    def _load(self) -> None:
        keys = Keys(_trusted(self._setting.keys)) if self._setting.keys else None
        self._callers.load(keys)
        self._page.watchers = keys.watchers if keys else frozenset()
        self._calls.obey_blocks()


def _identity_store(paths: Paths, environment: Mapping[str, str]) -> IdentityStore:
    """Return the store that the user's tokens come from; imports cryptography."""
    from cloister.runs.identity_store import IdentityStore

    return IdentityStore(f"{paths.state}/{DIRECTORY}", environment, hostname=socket.gethostname())


def _login_event(event: LoginEvent) -> None:
    say(f"login {event.login}: {event.what} {event.reason}".rstrip())


def _trusted(path: str) -> Source:
    source = read_trusted(path, os.getuid())
    if source is None:
        raise PolicyError([Problem("there is no such file", path)], reference="file-missing")
    return source


def _setting(options: argparse.Namespace) -> _Setting:
    owner = identify(os.environ.get("HOME", ""))
    paths = locate(os.environ, owner.home, owner.uid)
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError("listen-invalid", "--listen is ADDRESS:PORT", where=options.listen)
    environment = dict(os.environ)
    os.environ.pop(MASTER_KEY, None)
    return _Setting(paths, owner, options.policy, options.keys, host.strip("[]"), int(port), environment)


def _serve(setting: _Setting, ready: Callable[[int], None]) -> None:
    look_at_types()
    import uvloop

    files = PolicyFiles(setting.paths, setting.owner.uid, policy=setting.policy)
    books = Books(setting.paths, files.ledger)

    async def serve() -> None:
        logins = LoginSecrets(setting.paths.logins, _login_event)
        calls = calls_of(setting.paths, setting.owner, logins, books)
        try:
            await Service(setting, files, calls, books()).serve(ready)
        finally:
            await logins.close()

    try:
        uvloop.run(serve())
    finally:
        books.close()


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="cloister-inference", description="Serve model calls on a TCP port.")
    parser.add_argument("--policy", default="", help="the policy file (default: the user's own)")
    parser.add_argument("--keys", default="", help="file of lines AGENT KEY; runs can call by their identity tokens")
    parser.add_argument("--listen", default=f"127.0.0.1:{PORT}", help="address and port; port 0 takes a free one")
    parser.add_argument("--ready-fd", type=int, default=-1, help="descriptor that gets the port once it listens")
    options = parser.parse_args(argv)
    os.umask(0o077)

    def ready(number: int) -> None:
        sys.stdout.write(f"http://{options.listen.rpartition(':')[0]}:{number}\n")
        sys.stdout.flush()
        if options.ready_fd >= 0:
            os.write(options.ready_fd, f"{number}\n".encode())
            os.close(options.ready_fd)

    try:
        setting = _setting(options)
        os.makedirs(setting.paths.state, mode=0o700, exist_ok=True)
        keep_memory_private()
        _serve(setting, ready)
    except CloisterError as error:
        sys.stderr.write(render(error) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
