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
from _pytest.mark import ParameterSet

from support import installed
from support.installed import PROJECT, Leftovers
from support.machines import PYTHON, SUITES, Machine

Make = Callable[..., Machine]
PATIENCE_S = 30.0
RACE_S = 4.0

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


def points() -> Iterator[ParameterSet]:
    """Each point on one of the two systems; on the other one with the slow tests."""
    for (number, (victim, moment)), suite in itertools.product(enumerate(POINTS), SUITES):
        marks = () if SUITES[number % len(SUITES)] == suite else (pytest.mark.slow,)
        yield pytest.param(suite, victim, moment, id=f"{suite}-{victim}-{moment}", marks=marks)


@pytest.mark.parametrize(("suite", "victim", "moment"), list(points()), indirect=["suite"])
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


SWAP = """
import ctypes, itertools, sys
libc = ctypes.CDLL(None)
first, second = (name.encode() for name in sys.argv[1:3])
for count in itertools.count(1):
    libc.renameat2(-100, first, -100, second, 2)
    if count % 1000 == 0:
        print(count, flush=True)
"""
SHOW = "cat canary 2>/dev/null; ls -A /home/bob /root 2>/dev/null; echo written >proof; id -u"


@pytest.mark.parametrize("other", ["a link to bob's", "bob's own, moved in"])
def test_a_project_swapped_while_it_is_asked_for(host: Machine, other: str) -> None:
    """A run in a project whose name leads elsewhere every microsecond is refused, or works in the project."""
    host.run(["sh", "-c", "rm -rf /home/alice/src/race /home/alice/src/decoy /srv/bobs"])
    host.run(["sh", "-c", "mkdir -p /srv/bobs && echo SECRET >/srv/bobs/canary && chown -R bob /srv/bobs"])
    host.run(["mkdir", "-p", "src/race"], user="alice")
    host.run(["sh", "-c", "echo alices >src/race/canary"], user="alice")
    if other == "a link to bob's":
        host.run(["ln", "-s", "/srv/bobs", "src/decoy"], user="alice")
    else:
        host.run(["sh", "-c", "cp -a /srv/bobs /home/alice/src/decoy"])
    names = ["/home/alice/src/race", "/home/alice/src/decoy"]
    swapper = host.popen([PYTHON, "-c", SWAP, *names], user="alice", stdout=subprocess.PIPE, text=True)
    told, until = [], time.monotonic() + RACE_S
    try:
        assert swapper.stdout
        swapper.stdout.readline()
        while time.monotonic() < until:
            command = ["sh", "-c", f"cd src/race && exec cloister run shell -- bash -c '{SHOW}'"]
            done = host.run(command, user="alice", check=False)
            told.append((done.returncode, done.stdout, done.stderr))
    finally:
        swapper.kill()
        swaps = int(swapper.stdout.read().split()[-1])
        swapper.wait()
        swapper.stdout.close()

    assert not [one for one in told if "SECRET" in one[1]]
    assert not host.path("/srv/bobs/proof").exists()
    assert swaps > 20_000  # ten times as many on a quiet machine
    assert [code for code, _, _ in told if code], "no run met the other name"
    own = next(name for name in names if host.run(["stat", "-c", "%F %U", name]).stdout == "directory alice\n")
    host.run(["rm", "-f", f"{own}/proof"])
    quiet = host.run(["cloister", "run", "shell", "--", "bash", "-c", SHOW], user="alice", cwd=own)
    assert quiet.stdout.split() == ["alices", "1900000000"]
    assert host.path(f"{own}/proof").stat().st_uid == 1000
