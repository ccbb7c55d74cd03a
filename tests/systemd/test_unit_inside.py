"""A run under systemd, from a policy to its inside: what properties and mounts make of it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.machines import Machine

POLICY = """\
schema = 1

[agents.sh]
preset = "shell"
isolation = "unit"
limits.disk_max = "16M"

[agents.nest]
preset = "shell"
isolation = "unit"
hardening.nested = true

[users.alice]
agents = ["sh", "nest"]
roots = ["~/p"]
"""
TTY = "import os, pty; print(os.ttyname(pty.openpty()[1]))"
INJECT = "import fcntl, os, pty; fcntl.ioctl(pty.openpty()[1], 0x5412, b'x')"


@pytest.fixture(scope="module")
def installed(suite: str, layers: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with Cloister set up, and a project of alice's."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"inside-{suite}")) as machine:
        machine.write("/etc/cloister/cloister.toml", POLICY)
        machine.run(["cloister", "setup", "--yes"])
        machine.run(["sh", "-c", "cd && mkdir p && cd p && git init -q . && echo mine > file"], user="alice")
        yield machine


def inside(machine: Machine, script: str, agent: str = "sh") -> str:
    """Run a shell script as alice's agent in her project; return what it printed, errors among it."""
    command = ["cloister", "run", "--yes", agent, "--", "sh", "-c", f"exec 2>&1; {script}"]
    return str(machine.run(command, user="alice", cwd="/home/alice/p", check=False).stdout).strip()


def test_a_run_has_a_home_a_workspace_and_its_own_name(installed: Machine) -> None:
    """The account's home, the project at its own path, writable for the agent and alice's afterwards."""
    told = inside(
        installed, "id -un; echo $HOME; pwd; hostname; echo new > made && cat file made; touch ~/x && echo home"
    )

    assert told.split() == ["cl-sh-alice", "/home/cl-sh-alice", "/home/alice/p", "cloister", "mine", "new", "home"]
    assert installed.path("/home/alice/p/made").stat().st_uid == 1000


@pytest.mark.parametrize(
    "script", ["ls /sys", "touch /run/x", "touch /home/x", "touch /usr/x", "ls /dev/mqueue", "touch .git/hooks/x",
               "echo x > .git/config", "cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern",
               f'python3 -c "{INJECT}"', "unshare -Ur true", "rm -r /run/cloister/box/egress.sock"],
)  # fmt: skip
def test_what_surrounds_an_agent_cannot_be_changed(installed: Machine, script: str) -> None:
    """Neither the host's directories nor its own run's, and no word can be typed into a terminal."""
    assert inside(installed, f"{{ {script}; }} >/dev/null || echo refused").splitlines()[-1] == "refused"


def test_terminals_and_shared_memory_are_its_own(installed: Machine) -> None:
    """The first terminal of a run is number 0 whatever the host has open; nothing in /dev/shm is of the host."""
    installed.write("/dev/shm/of-the-host", "x")
    other = installed.popen(["script", "-qc", "sleep 60", "/dev/null"])
    try:
        assert inside(installed, f"python3 -c '{TTY}'; ls /dev/shm; touch /dev/shm/x && echo mine").split() == [
            "/dev/pts/0",
            "mine",
        ]
    finally:
        other.kill()
        other.wait()


def test_disk_max_holds_for_all_it_writes_beside_the_workspace(installed: Machine) -> None:
    """Home, /tmp, /var/tmp and /dev/shm take what is allowed and refuse more."""
    for place in ("$HOME", "/tmp", "/var/tmp", "/dev/shm"):
        told = inside(installed, f"head -c 8M /dev/zero > {place}/x && echo some; head -c 32M /dev/zero > {place}/x")
        assert told.split()[0] == "some"
        assert "No space left" in told


def test_a_nested_agent_builds_its_own_sandbox(installed: Machine) -> None:
    """Bubblewrap inside, as Claude Code brings it; what surrounds it stays out of reach."""
    build = "bwrap --unshare-all --ro-bind / / --dev /dev --bind /proc /proc sh -c"
    told = inside(installed, f"{build} 'echo built; touch x'; {build} 'ls /sys'", "nest")

    assert told.startswith("built")
    assert "Read-only" in told
    assert "Permission denied" in told
