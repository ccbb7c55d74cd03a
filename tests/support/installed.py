"""A test machine on which Cloister is set up for the whole system, runs on it, and what must be left of them: nothing.

`install` is what an owner does: a policy, `cloister setup`. `Leftovers` says what remains of runs that are over.
"""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from support.machines import PYTHON, Machine

POLICY = """\
schema = 1

[agents.shell]
isolation = "unit"
command = ["bash"]

[users.alice]
agents = ["shell"]
roots = ["~/src"]
"""
PROJECT = "/home/alice/src/project"
SETTLE_S = 15.0


def install(machine: Machine, policy: str = POLICY) -> None:
    """Set Cloister up with a policy of the system, and give alice a project."""
    machine.write("/etc/cloister/cloister.toml", policy)
    machine.run(["cloister", "setup", "--yes"])
    machine.run(["mkdir", "-p", PROJECT], user="alice")


def start(machine: Machine, script: str, *options: str, **more: Any) -> subprocess.Popen[str]:
    """Start a shell script in alice's project as an agent; its output is a pipe, its input empty."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    return machine.popen(command(script, *options), user="alice", cwd=PROJECT, **pipes)


def run(machine: Machine, script: str, *options: str, check: bool = True) -> str:
    """Run a shell script in alice's project as an agent; return what it printed."""
    return str(machine.run(command(script, *options), user="alice", cwd=PROJECT, check=check).stdout)


def command(script: str, *options: str) -> list[str]:
    """Return the command by which a user starts a shell script as an agent."""
    return ["cloister", "run", *options, "shell", "--", "bash", "-c", script]


def living(machine: Machine) -> list[dict[str, Any]]:
    """Return alice's runs that are not over, as `cloister ps` tells them."""
    told = machine.run(["cloister", "ps", "--json"], user="alice").stdout
    return [one for one in json.loads(told) if one["status"] in {"starting", "running"}]


LOOK = """
import json, os, subprocess
def below(folder):
    return sorted(os.path.join(top, name) for top, folders, files in os.walk(folder) for name in [*folders, *files])
units = subprocess.run(
    ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", "cloister-run-*"],
    stdout=subprocess.PIPE, text=True, check=True,
).stdout
processes = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        uid = os.stat(f"/proc/{pid}/task").st_uid
        status = open(f"/proc/{pid}/status").read()
    except OSError:
        continue
    if int(status.split("Uid:")[1].split()[0]) >= 1900000000 and "State:\\tZ" not in status:
        processes.append(status.split()[1])
places = ("/var/lib/cloister/hostd/runs", "/run/cloister/units", "/run/cloister/proxy/runs")
print(json.dumps({
    "units": [line.split()[0] for line in units.splitlines() if line.strip()],
    "processes": processes,
    "files": [path for place in places for path in below(place)],
    "transient": [name for name in os.listdir("/run/systemd/transient") if name.startswith("cloister-run-")],
    "mounts": sorted(line.split()[4] for line in open("/proc/1/mountinfo")),
    "project": below(PROJECT),
}))
"""


class Leftovers:
    """What was there of runs at one moment, and whether it is again."""

    def __init__(self, machine: Machine) -> None:
        """Look, with no run alive."""
        self._machine = machine
        self.before = self.look()

    def look(self) -> dict[str, list[str]]:
        """Return units, processes, files of root's part, mounts of the host, and names in the project."""
        code = LOOK.replace("below(PROJECT)", f"below({PROJECT!r})")
        return dict(json.loads(self._machine.run([PYTHON, "-I", "-c", code]).stdout))

    def pause(self, allowed: tuple[str, ...] = (), patience_s: float = 1.5) -> None:
        """Give what ends by itself the time for it; what only the next start finds may still be there afterwards."""
        until = time.monotonic() + patience_s
        while self._more(allowed) and time.monotonic() < until:
            time.sleep(0.1)

    def check(self, allowed: tuple[str, ...] = ()) -> None:
        """Wait until nothing is there that was not; raises AssertionError that names it.

        Args:
            allowed: names in the project that the agent was to make.
        """
        until = time.monotonic() + SETTLE_S
        while left := self._more(allowed):
            if time.monotonic() > until:
                raise AssertionError(f"left: {left}")
            time.sleep(0.1)

    def _more(self, allowed: tuple[str, ...]) -> dict[str, list[str]]:
        """Return what is there and was not, and mounts that were there and are not."""
        now, made = self.look(), {f"{PROJECT}/{name}" for name in allowed}
        left = {kind: sorted({*names} - {*self.before[kind]} - made) for kind, names in now.items()}
        left["mounts that are gone"] = sorted({*self.before["mounts"]} - {*now["mounts"]})
        return {kind: names for kind, names in left.items() if names}
