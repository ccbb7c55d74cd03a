"""Where a battery happens: directories of its own, a broker of its own, and the user's policy.

The battery attacks policy files, the proxy and the broker; so that a real run of the user can
never be hurt by it, it brings its own state and runtime directories, and with them its own
broker. Configuration is the user's: the sandbox under attack is the one that `cloister run`
would give. Nothing of this remains afterwards.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from typing import Self

from cloister.errors import UnsupportedError
from cloister.host import removal
from cloister.host.owner import Owner, identify
from cloister.policy.merge import ResolvedAgent
from cloister.runs.paths import Paths, locate
from cloister.runs.policies import PolicyFiles
from cloister.runs.workspaces import expand

_MAX_SOCKET_PATH = 107  # unix(7): sun_path is 108 bytes with its end
_SOCKET = "/cloister/runs/0123456789ab/box/egress.sock"


class Place:
    """Directories for one battery; use as a context manager."""

    def __init__(self, environ: Mapping[str, str], agent: str, profile: str = "") -> None:
        """Read the user's policy; make nothing yet.

        Raises:
            CloisterError: there is no such agent, or the policy is wrong.
        """
        self.owner: Owner = identify(environ.get("HOME", ""))
        self.home = self.owner.home
        self.user_paths: Paths = locate(environ, self.owner.home, self.owner.uid)
        self.agent = agent
        self.profile = profile
        policies = PolicyFiles(self.user_paths, self.owner.uid)
        self.resolved: ResolvedAgent = policies.resolve(agent, profile)
        self.unit = self.resolved.agent.isolation == "unit"
        """Whether runs are units of the system, so that root's daemon and the system's broker are attacked as well."""
        self._environ = dict(environ)
        name = f"prove-{secrets.token_hex(4)}"
        limits = (self.resolved.agent.workspace.roots, policies.admit(self.owner.name, agent))
        self.base = f"{_parent(limits, self.owner.home)}/{name}"
        runtime = environ.get("XDG_RUNTIME_DIR", "")
        short = f"{runtime}/cloister-{name}" if runtime.startswith("/") else ""
        self.runtime = short if short and os.path.isdir(runtime) else f"{self.base}/run"
        if len(os.fsencode(self.runtime + _SOCKET)) > _MAX_SOCKET_PATH:
            raise UnsupportedError(
                "path-too-long", "the path of a Unix socket would be too long", where=self.runtime,
                remedy="export XDG_RUNTIME_DIR=/run/user/$(id -u)",
            )  # fmt: skip

    def __enter__(self) -> Self:
        os.makedirs(self.base, mode=0o700)
        os.makedirs(self.runtime, mode=0o700, exist_ok=True)
        self._lend_logins()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_broker()
        for path in (self.runtime, self.base):
            removal.sweep(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self.base))  # only when it was ours alone

    def _lend_logins(self) -> None:
        """Have the battery's broker use the user's own logins: a copy would renew a token that the original still has.

        The lock of each login holds among brokers, so this one and the user's take turns.
        """
        if os.path.isdir(self.user_paths.logins):
            os.makedirs(self.paths.state, mode=0o700)
            os.symlink(self.user_paths.logins, self.paths.logins)

    @property
    def paths(self) -> Paths:
        """Where the battery's own runs keep their things."""
        return locate(self.environment, self.owner.home, self.owner.uid)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command of the battery."""
        own = {"HOME": self.owner.home, "XDG_STATE_HOME": f"{self.base}/state", "XDG_RUNTIME_DIR": self.runtime}
        return {**self._environ, **own, "CLOISTER_BROKER_IDLE_S": "60"}

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return the command line that runs `words` in the agent's sandbox."""
        options = ["--yes", "-C", directory, *([] if pty else ["--no-pty"])]
        options += ["--profile", self.profile] if self.profile else []
        return [sys.executable, "-I", "-m", "cloister", "run", *options, self.agent, "--", *words]

    def broker_pid(self) -> int:
        """Return the pid of the battery's own broker, 0 when there is none."""
        try:
            with open(f"{self.runtime}/cloister/broker.lock", encoding="ascii") as file:
                pid = int(file.read() or "0")
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return pid if b"cloister.services.broker" in file.read() else 0
        except (OSError, ValueError):
            return 0

    def stop_broker(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the battery's own broker, and wait until it is gone."""
        pid = self.broker_pid()
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + 5.0
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline and self.broker_pid() == pid:
            time.sleep(0.02)


def _parent(limits: tuple[tuple[str, ...], ...], home: str) -> str:
    """Return where our directory goes: below the first root that the agent and `[users]` allow, else in the cache."""
    lists = [expand(roots, home) for roots in limits if roots]
    for path in (path for roots in lists for path in roots):
        held = all(any(f"{path}/".startswith(f"{root.rstrip('/')}/") for root in roots) for roots in lists)
        if held and os.path.isdir(path) and not os.path.islink(path):
            return f"{path.rstrip('/')}/.cloister"
    return f"{home}/.cache/cloister"
