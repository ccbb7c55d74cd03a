"""SIGKILL for each party of a run at each step, and reboots: then everything runs as declared, or is gone.

The parties are those of ARCHITECTURE, "Runs under systemd". A step is seen by what it leaves in the machine: a record,
a unit, a file of the agent's. After each kill the same three things are asked: nobody waits for ever, the next run
works, and nothing of the first is left, neither in the system nor in the user's project.
"""

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import installed
from support.installed import PROJECT, Leftovers
from support.machines import Machine

Make = Callable[..., Machine]
PATIENCE_S = 30.0

VICTIMS = {
    # Party: what its command line matches; the shim is found by its unit. Children of hostd look like their parent.
    "hostd": "cloister.services.hostd",
    "the system's broker": "cloister.services.proxyd",
    "the user's broker": "cloister.services.broker",
    "the client": "^cloister run",
    "the shim": "",
    "the agent": "^sleep 4711",
}
MOMENTS = {
    # Step: what there is as soon as it has begun, relative to the machine's root.
    "asked": "home/alice/.local/state/cloister/runs/*",
    "recorded": "var/lib/cloister/hostd/runs/*.json",
    "unit": "run/systemd/transient/cloister-run-*.service",
    "running": f"{PROJECT[1:]}/made",
}
NEVER = {
    # Not there yet at that step.
    ("the shim", "asked"), ("the shim", "recorded"), ("the agent", "asked"), ("the agent", "recorded"),
    ("the agent", "unit"),
}  # fmt: skip
ENDS = {(victim, "running") for victim in VICTIMS if victim != "hostd"}
"""Where the run cannot go on. Elsewhere it may, when what was killed was not needed yet, or not any more."""
POINTS = [point for point in itertools.product(VICTIMS, MOMENTS) if point not in NEVER]


@pytest.fixture(scope="module")
def host(suite: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which alice may start a shell as an agent."""
    layers = request.getfixturevalue("layers")
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"crashes-{suite}")) as machine:
        installed.install(machine)
        assert installed.run(machine, "echo works") == "works\n"
        yield machine


def seen(machine: Machine, pattern: str) -> set[str]:
    """Return the files inside that match one of the patterns."""
    root = Path(f"/proc/{machine.pid}/root")
    return {str(path) for one in pattern.split("|") for path in root.glob(one)}


def kill(machine: Machine, victim: str) -> bool:
    """Send SIGKILL; tell whether there was somebody to send it to."""
    if victim == "the shim":
        # The file of a unit is there a moment before its process is.
        machine.wait_for("systemctl list-units --plain --no-legend 'cloister-run-*' | grep -q .")
        command = ["systemctl", "kill", "--kill-whom=main", "-s", "KILL", "cloister-run-*"]
        return not machine.run(command, check=False).returncode
    words = ["pkill", "-KILL", "-f", "--", VICTIMS[victim]]
    return machine.run(words, check=False).returncode == 0


def survive(machine: Machine, process: subprocess.Popen[str]) -> None:
    """Wait until a run has ended, or the agent runs: systemd may have started a daemon again in time. Then stop it."""
    until = time.monotonic() + PATIENCE_S
    while process.poll() is None:
        assert time.monotonic() < until, "it neither runs nor ends"
        if machine.run(["pgrep", "-f", VICTIMS["the agent"]], check=False).returncode == 0:
            machine.run(["pkill", "-TERM", "-f", VICTIMS["the client"]])
            return
        time.sleep(0.05)


@pytest.mark.parametrize(("victim", "moment"), POINTS, ids=[f"{victim}-{moment}" for victim, moment in POINTS])
def test_killed_at_a_step(host: Machine, victim: str, moment: str) -> None:
    """The run ends, with a status that is no success; the next one works, and nothing of the first is left."""
    host.run(["rm", "-f", f"{PROJECT}/made"])
    left, before = Leftovers(host), seen(host, MOMENTS[moment])
    process = installed.start(host, "touch made; exec sleep 4711")
    try:
        until = time.monotonic() + PATIENCE_S
        while not seen(host, MOMENTS[moment]) - before:
            assert time.monotonic() < until, "the step never came"
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.001)
        hit = kill(host, victim)
        if (victim, moment) not in ENDS:
            survive(host, process)
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()

    assert hit, "there was nobody to kill"
    assert process.returncode not in {0, None}, said
    left.pause(("made",))
    assert installed.run(host, "cat /proc/self/status | grep -c Seccomp:.2; rm -f made") == "1\n"
    left.check()


def test_everybody_is_killed_at_once(host: Machine) -> None:
    """Daemons, broker, client and agent together: the next start finds what is left, and undoes it."""
    left = Leftovers(host)
    process = installed.start(host, "touch made; exec sleep 4711")
    host.wait_for(f"test -e {PROJECT}/made")
    host.run(["pkill", "-KILL", "-f", "cloister|sleep 4711"], check=False)
    process.communicate(timeout=PATIENCE_S)
    assert installed.run(host, "rm -f made; echo again") == "again\n"
    left.check()


def test_a_detached_run_lives_on_without_hostd(host: Machine) -> None:
    """Nothing is held by hostd: its end ends no run. The end of the system's broker does: it decides what leaves."""
    left = Leftovers(host)
    installed.run(host, "touch made; exec sleep 4711", "-d")
    host.wait_for(f"test -e {PROJECT}/made")
    kill(host, "hostd")
    assert installed.run(host, "echo works") == "works\n"
    assert len(installed.living(host)) == 1
    assert kill(host, "the system's broker")
    assert installed.run(host, "rm -f made; echo again") == "again\n"
    left.check()
    assert not installed.living(host)


@pytest.mark.parametrize("how", ["reboot", "cut"])
def test_after_a_reboot_everything_is_as_declared_or_gone(fresh_machine: Make, how: str) -> None:
    """Runs are over and say so, daemons listen, the packet filter stands before anything runs, and runs work."""
    machine = fresh_machine()
    installed.install(machine)
    installed.run(machine, "true")
    left = Leftovers(machine)
    filters = machine.run(["nft", "list", "table", "inet", "cloister"]).stdout
    installed.run(machine, "echo here >made; exec sleep 4711", "-d")
    process = installed.start(machine, "exec sleep 4712")
    machine.wait_for(f"test -s {PROJECT}/made && pgrep -f 'sleep 4712'")
    if how == "reboot":
        machine.reboot()
    else:
        machine.cut()
    process.communicate(timeout=PATIENCE_S)

    assert machine.read(f"{PROJECT}/made") == "here\n"
    assert not installed.living(machine)
    for unit in ("cloister-hostd.socket", "cloister-proxyd.socket", "cloister-firewall.service"):
        assert machine.show(unit, "ActiveState") == "active"
    assert machine.run(["nft", "list", "table", "inet", "cloister"]).stdout == filters
    told = json.loads(machine.run(["cloister", "ps", "--all", "--json"], user="alice").stdout)
    assert told
    assert installed.run(machine, "cat made; rm made") == "here\n"
    left.check()
