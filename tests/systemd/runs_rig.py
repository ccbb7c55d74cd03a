"""A machine on which alice may start agents as system users: set up by `cloister setup`, asked by her `cloister`."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

from support.machines import Machine

POLICY = """\
schema = 1

[agents.sh]
isolation = "unit"
command = ["/bin/sh"]

[agents.short]
isolation = "unit"
command = ["/bin/sh"]
limits = { runtime_max = "1s" }

[agents.small]
isolation = "unit"
command = ["/bin/sh"]
limits = { memory_max = "48M" }

[agents.kept]
isolation = "unit"
command = ["/bin/sh"]
limits = { memory_max = "96M", tasks_max = 60, enforce = "cgroup" }

[agents.web]
isolation = "unit"
command = ["/bin/sh"]
egress = { allow = ["allowed.example:443", "other.example:443"] }

[agents.box]
command = ["/bin/sh"]

[users.alice]
agents = ["sh", "short", "small", "web", "kept", "box"]
roots = ["~/p"]

[users.bob]
agents = ["sh"]
roots = ["~/p"]
"""
POLICY_FILE = "/etc/cloister/cloister.toml"
STATE = ".local/state/cloister"
ASK_PROXY = r"""
exec 3<>/dev/tcp/127.0.0.1/3128
printf 'CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n' "$0" "$0" >&3
head -1 <&3
"""
"""Words for bash: what the proxy inside says of a host and port."""


class Rig:
    """The machine, with words for what the tests do most."""

    def __init__(self, machine: Machine, policy: str = POLICY) -> None:
        """Install, and give alice and bob a project."""
        self.machine = machine
        machine.write(POLICY_FILE, policy)
        machine.run(["cloister", "setup", "--yes"], timeout=120)
        for user in ("alice", "bob"):
            machine.run(["sh", "-c", "mkdir -p p/one/.git/hooks p/one/sub"], user=user)
        self.project = "/home/alice/p/one"

    def cloister(self, *words: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run alice's `cloister` in her project, whatever comes of it."""
        options = {"user": "alice", "cwd": self.project, "check": False, **options}
        return self.machine.run(["cloister", *words], **options)

    def sh(self, script: str, *, agent: str = "sh", **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a shell script in a unit."""
        return self.cloister("run", agent, "--", "/bin/sh", "-c", script, **options)

    def detach(self, script: str, *, agent: str = "sh") -> str:
        """Start a script in the background; return the id of the run."""
        done = self.cloister("run", "-d", agent, "--", "/bin/sh", "-c", script)
        assert done.returncode == 0, done.stderr
        return str(done.stdout.strip())

    def receipt(self, run: str = "last") -> dict[str, Any]:
        """Return a receipt of alice's."""
        told: dict[str, Any] = json.loads(self.cloister("receipt", run, "--json").stdout)
        return told

    def units(self) -> list[str]:
        """Return the units of runs that systemd knows."""
        listing = self.machine.run(["systemctl", "list-units", "--all", "--plain", "--no-legend", "cloister-run-*",
                                    "cloister-net-*"])  # fmt: skip
        return [line.split()[0] for line in listing.stdout.splitlines()]

    def remains(self) -> dict[str, list[str]]:
        """Return what is left of runs anywhere; lists are empty when everything was undone."""

        def names(path: str) -> list[str]:
            place = self.machine.path(path)
            return sorted(entry.name for entry in place.iterdir()) if place.exists() else []

        journal = self.machine.path(f"/home/alice/{STATE}/placeholders.jsonl")
        return {
            "units": self.units(),
            "records of hostd": names("/var/lib/cloister/hostd/runs"),
            "directories of hostd": names("/run/cloister/units"),
            "directories of proxyd": names("/run/cloister/proxy/runs"),
            "in the workspace": [name for name in names(self.project) if name not in (".git", "sub", "kept")],
            "placeholders": journal.read_text().splitlines() if journal.exists() else [],
        }

    def clean(self, within_s: float = 20.0) -> None:
        """Wait until nothing of any run is left.

        Raises:
            AssertionError: something stays.
        """
        self.until(lambda: not any(self.remains().values()), within_s, self.remains)

    def until(self, true: Callable[[], bool], within_s: float = 20.0, shown: Callable[[], Any] = lambda: "") -> None:
        """Wait until something is true.

        Raises:
            AssertionError: it does not become so in time.
        """
        end = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < end, (shown(), self.machine.journal())
            time.sleep(0.05)

    def main_pid(self, unit: str) -> int:
        """Return the pid of a service's first process, inside the machine."""
        return int(self.machine.run(["systemctl", "show", "-P", "MainPID", unit]).stdout)

    def kill(self, pid: int) -> None:
        """SIGKILL a process of the machine."""
        self.machine.run(["kill", "-KILL", str(pid)])

    def broker_pid(self) -> int:
        """Return the pid of alice's own broker."""
        told = self.cloister("ps")  # so that there is one
        assert told.returncode == 0
        for place in ("/run/user/1000/cloister/broker.lock", f"/home/alice/{STATE}/cloister/broker.lock"):
            if self.machine.path(place).exists():
                return int(self.machine.read(place))
        raise AssertionError("alice has no broker")
