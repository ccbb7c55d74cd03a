"""The inference proxy as a service of its own: TCP port 11435, callers known by virtual keys.

    python -m cloister.services.inference --keys FILE [--policy FILE] [--listen 127.0.0.1:11435]

FILE holds one line per key, `AGENT KEY`, and belongs to its owner alone (mode 0600). What an agent may do stands in
its `llm` table of the policy. The key of a line `@metrics KEY` opens `/metrics`, in the text format of Prometheus.
SIGHUP reads policy, keys and blocked agents again. Within a broker the same core serves runs through their own
sockets (`runs/models.py`), which needs no such keys.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from cloister.errors import CloisterError, PolicyError, Problem, render
from cloister.host.owner import identify
from cloister.policy.document import read
from cloister.policy.load import load_document
from cloister.policy.merge import resolve
from cloister.policy.presets import all_presets
from cloister.relay.exchange import Exchange
from cloister.relay.llm.entry import presented
from cloister.relay.llm.listen import ModelServer
from cloister.relay.llm.service import Caller
from cloister.runs.model_calls import PORT, ModelCalls
from cloister.runs.model_store import Store, model_calls
from cloister.runs.paths import Paths, locate
from cloister.runs.policies import Source, read_trusted

METRICS = "@metrics"
"""In the place of an agent's name, which never begins so: who may read the metrics."""


class Keys:
    """Virtual keys, as a file holds them."""

    def __init__(self, source: Source) -> None:
        """Read the lines of a file.

        Raises:
            PolicyError: a line is not `AGENT KEY`, or a key is too short to be one.
        """
        self.agents: list[tuple[str, str]] = []
        for number, line in enumerate(source.text.decode("utf-8", "replace").splitlines(), 1):
            words = line.split()
            if not words or line.startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) < 16:  # noqa: PLR2004 - AGENT KEY
                problem = Problem("a line is AGENT KEY, the key at least 16 characters", f"{source.path}:{number}")
                raise PolicyError([problem], reference="keys-invalid")
            self.agents.append((words[0], words[1]))


class _Setting(NamedTuple):
    """What the command line and the environment say."""

    paths: Paths
    policy: str
    keys: str
    host: str
    port: int
    user: str


class Service:
    """The proxy, and the callers it knows."""

    def __init__(self, setting: _Setting, calls: ModelCalls, store: Store) -> None:
        """Read policy and keys.

        Raises:
            CloisterError: one of them is missing, wrong or not to be trusted.
        """
        self._setting, self._calls, self._store = setting, calls, store
        self._watchers: frozenset[str] = frozenset()
        self._known: dict[str, Caller] = {}
        self._callers: dict[str, Caller] = {}
        self._load()

    def identify(self, tokens: list[str]) -> Caller | None:
        """Return who presents one of these tokens."""
        for token in tokens:
            caller = self._known.get(token)
            if caller is not None:
                return caller
        return None

    def show_metrics(self, exchange: Exchange) -> bool:
        """Answer a request for metrics, if it is one that may be answered."""
        if (exchange.method, exchange.url) != ("GET", b"/metrics"):
            return False
        if self._store.books is None or not self._watchers.intersection(presented(exchange.headers)):
            return False  # as if there was nothing: it tells who spends how much
        text = self._store.books.metrics_text(self._calls.budget_shares())
        exchange.respond_message(200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], text)
        return True

    def reload(self) -> None:
        """Read policy and keys again; mistakes leave everything as it was."""
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
        server = ModelServer(self._calls.inference, self.identify, other=self.show_metrics)
        if self._store.books is not None:
            self._store.books.gather(loop.call_soon)
        ready(await server.start(self._setting.host, self._setting.port))
        gc.freeze()  # what is loaded now stays: nothing of it needs to be looked through again
        gc.set_threshold(20_000, 20, 50)
        try:
            await over.wait()
        finally:
            await server.close()
            await self._calls.close()

    def _load(self) -> None:
        policy = _trusted(self._setting.policy)
        document = read(policy.text, policy.path)
        presets = all_presets({})
        loaded = load_document(document, preset_names=tuple(presets))
        known = {}
        keys = Keys(_trusted(self._setting.keys)).agents
        self._watchers = frozenset(key for agent, key in keys if agent == METRICS)
        for agent, key in keys:
            if agent == METRICS:
                continue
            llm = resolve(document, agent, presets=presets, policy=loaded).agent.llm
            caller = self._callers.get(agent)
            if caller is None:
                run = f"service-{agent}"
                caller = self._callers[agent] = self._calls.caller(run, agent, self._setting.user, llm, loaded)
            else:
                self._calls.update(caller, llm, loaded)
            known[key] = caller
        self._known = known
        self._calls.obey_blocks()


def _trusted(path: str) -> Source:
    source = read_trusted(path, os.getuid())
    if source is None:
        raise PolicyError([Problem("there is no such file", path)], reference="file-missing")
    return source


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="cloister-inference", description="Serve model calls on a TCP port.")
    parser.add_argument("--policy", default="", help="the policy file (default: the user's own)")
    parser.add_argument("--keys", required=True, help="file of lines AGENT KEY")
    parser.add_argument("--listen", default=f"127.0.0.1:{PORT}", help="address and port; port 0 takes a free one")
    parser.add_argument("--ready-fd", type=int, default=-1, help="descriptor that gets the port once it listens")
    options = parser.parse_args(argv)
    os.umask(0o077)
    owner = identify(os.environ.get("HOME", ""))
    paths = locate(os.environ, owner.home, owner.uid)
    host, _, port = options.listen.rpartition(":")
    setting = _Setting(paths, options.policy or paths.policy, options.keys, host.strip("[]"), int(port), owner.name)

    def ready(number: int) -> None:
        sys.stdout.write(f"http://{options.listen.rpartition(':')[0]}:{number}\n")
        sys.stdout.flush()
        if options.ready_fd >= 0:
            os.write(options.ready_fd, f"{number}\n".encode())
            os.close(options.ready_fd)

    try:
        import uvloop

        os.makedirs(paths.state, mode=0o700, exist_ok=True)
        policy = _trusted(setting.policy)
        ledger = load_document(read(policy.text, policy.path), preset_names=tuple(all_presets({}))).ledger
        with model_calls(paths, owner, lambda: ledger) as (calls, store):
            uvloop.run(Service(setting, calls, store).serve(ready))
    except CloisterError as error:
        sys.stderr.write(render(error) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
