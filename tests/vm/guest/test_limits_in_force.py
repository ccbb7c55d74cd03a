"""Limits of a whole run on a real cgroup v2 tree: in a login session (systemd scope), and where a cgroup was given.

CLOISTER_TEST_MACHINE says which of the two this is: `scope` or `cgroup`.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.cloister import BASE, User, descendants

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]

BY_SCOPE = os.environ.get("CLOISTER_TEST_MACHINE") == "scope"
LIMITED = BASE + '[agents.shell.limits]\nenforce = "cgroup"\n'
PYTHON = "/usr/bin/python3"
DIES = """
import os, signal, sys, time
children = []
for mib in map(int, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        kept = bytearray(mib << 20)
        for place in range(0, len(kept), 4096):
            kept[place] = 1
        time.sleep(6)
        os._exit(0)
    children.append(child)
print(sorted(os.waitpid(child, 0)[1] for child in children))
"""
BURN = """
import os, time
children = []
began = time.monotonic()
for _ in range(2):
    child = os.fork()
    if child == 0:
        while time.monotonic() - began < 5:
            pass
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
spent = os.times()
print((spent.children_user + spent.children_system) / (time.monotonic() - began))
"""


def left() -> list[str]:
    """Return the cgroups of runs that are there."""
    return [str(path) for path in Path("/sys/fs/cgroup").rglob("cloister-*")]


def settled(timeout_s: float = 10) -> list[str]:
    """Return the cgroups that stay."""
    until = time.monotonic() + timeout_s
    while (found := left()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def test_the_doctor_knows_this_host(user: User, workspace: Path) -> None:
    """What this kernel and this session offer is found, and what is missing is named."""
    report = json.loads(user.run("doctor", "--json", cwd=workspace).stdout)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    meanings = {finding["name"]: finding["meaning"] for finding in report["findings"]}
    release = tuple(map(int, os.uname().release.split(".")[:2]))

    wanted = ("bubblewrap", "helper", "namespaces", "seccomp", "limits", "overlay", "internet", "systemd", "btf")
    assert {name: states[name] for name in wanted} == dict.fromkeys(wanted, "ok"), meanings
    assert ("systemd manager" in meanings["limits"]) == BY_SCOPE
    assert report["facts"]["landlock_abi"] == {(6, 1): 2}.get(release, report["facts"]["landlock_abi"])
    assert states["landlock"] == ("ok" if release >= (6, 12) else "degraded")
    assert user.inside("true", cwd=workspace).returncode == 0
    assert f"landlock={report['facts']['landlock_abi']}" in user.receipts()[-1]["probe"]
    user.close()


def test_memory_is_limited_for_all_processes_together(user: User, workspace: Path) -> None:
    """Of two processes that want 0.6 of the limit each one dies, and the run says why; one alone lives."""
    user.write_policy(LIMITED + 'memory_max = "128M"\n')
    two = user.run("run", "shell", "--", PYTHON, "-c", DIES, "77", "77", cwd=workspace)
    one = user.run("run", "shell", "--", PYTHON, "-c", DIES, "77", cwd=workspace)

    assert two.stdout == f"[0, {int(signal.SIGKILL)}]\n", two.stderr
    assert "memory_max was reached: the kernel ended 1 process" in two.stderr
    assert one.stdout == "[0]\n", one.stderr
    assert "reached" not in one.stderr
    word = "cgroup (systemd scope)" if BY_SCOPE else "cgroup"
    assert f"memory_max 128M: {word}" in user.receipts()[-1]["limits"]
    user.close()


def test_files_in_memory_count(user: User, workspace: Path) -> None:
    """/tmp lies in memory: it is no way around the limit."""
    user.write_policy(LIMITED + 'memory_max = "128M"\n')
    done = user.inside("head -c 300M /dev/zero > /tmp/big; wc -c < /tmp/big", cwd=workspace)

    assert int(done.stdout or 0) < 128 << 20
    assert "memory_max was reached" in done.stderr
    user.close()


def test_a_fork_bomb_stays_in_its_bounds(user: User, workspace: Path) -> None:
    """At most so many tasks at once, further commands of `exec` among them, and the rest of the machine goes on."""
    user.write_policy(LIMITED + "tasks_max = 40\n")
    bomb = user.start("run", "shell", "--", "sh", "-c", "f() { f | f & }; f; sleep 300", cwd=workspace)
    run = user.wait_running()[0]["id"]
    time.sleep(3)
    (cgroup,) = left()
    current = int(Path(cgroup, "pids.current").read_text())
    inside = user.run("exec", run, "--", "true", cwd=workspace)
    outside = subprocess.run(["true"], check=False)
    user.run("stop", run, cwd=workspace)
    _, said = bomb.communicate(timeout=60)

    assert current <= 40
    assert inside.returncode in {0, 125}, inside.stderr
    assert outside.returncode == 0
    assert b"tasks_max was reached" in said, said[-500:]
    assert user.receipts()[-1]["reason"] in {"exited", "stopped"}
    assert settled() == []
    user.close()


def test_the_processor_is_shared_as_the_quota_says(user: User, workspace: Path) -> None:
    """Two busy processes get half a processor together; without a quota they get more than one."""
    user.write_policy(LIMITED + 'cpu_quota = "50%"\n')
    half = user.run("run", "shell", "--", PYTHON, "-c", BURN, cwd=workspace)
    user.write_policy(LIMITED)
    free = user.run("run", "shell", "--", PYTHON, "-c", BURN, cwd=workspace)

    assert 0.25 < float(half.stdout) < 0.8, half
    assert float(free.stdout) > 1.1, free
    user.close()


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_exit_code_survives_the_end_of_the_cgroup(user: User, workspace: Path, command: str, code: int) -> None:
    """What ends with the run is the sandbox, never who waits for it; and nothing of the cgroup stays."""
    user.write_policy(LIMITED + "tasks_max = 50\n")

    assert user.inside(command, cwd=workspace).returncode == code
    assert settled() == []
    user.close()


def test_the_client_stays_in_its_session(user: User, workspace: Path) -> None:
    """Only the sandbox is moved: what the person started stays where it was started."""
    user.write_policy(LIMITED + "tasks_max = 50\n")
    run = user.start("run", "shell", "--", "sleep", "60", cwd=workspace)
    record = user.wait_running()[0]
    members = [int(pid) for path in left() for pid in Path(path, "cgroup.procs").read_text().split()]
    mine, client = (Path(f"/proc/{pid}/cgroup").read_text() for pid in ("self", run.pid))
    user.run("stop", record["id"], cwd=workspace)
    run.communicate(timeout=60)

    assert client == mine
    assert len(members) == 2  # the sandbox's first process, and the agent
    user.close()


def test_without_limits_there_is_no_cgroup(user: User, workspace: Path) -> None:
    """The ordinary run asks nobody for anything."""
    user.write_policy(LIMITED + 'runtime_max = "1h"\nopen_files = 512\n')
    run = user.start("run", "shell", "--", "sleep", "60", cwd=workspace)
    record = user.wait_running()[0]
    found = left()
    user.run("stop", record["id"], cwd=workspace)
    run.communicate(timeout=60)

    assert found == []
    user.close()


@pytest.mark.parametrize("role", ["client", "broker", "inner"])
def test_nothing_stays_when_one_of_us_is_killed(user: User, workspace: Path, role: str) -> None:
    """SIGKILL to any of our processes ends the run, its cgroup included, before or at the next start."""
    user.write_policy(LIMITED + "tasks_max = 50\n")
    run = user.start("run", "shell", "--", "sh", "-c", "sleep 301 & sleep 301", cwd=workspace)
    user.wait_running()
    assert len(left()) == 1
    inner = [int(pid) for pid in Path(left()[0], "cgroup.procs").read_text().split()]
    os.kill({"client": run.pid, "broker": user.broker_pid, "inner": min(inner)}[role], signal.SIGKILL)
    run.communicate(timeout=60)

    assert user.inside("true", cwd=workspace).returncode == 0
    assert settled() == []
    assert descendants([b"sleep\x00301"]) == []
    user.close()


def test_the_next_broker_ends_what_is_left(user: User, workspace: Path) -> None:
    """What lives under the name of a dead broker's run is found by the stored plan, and ended."""
    user.write_policy(LIMITED + "tasks_max = 50\n")
    run = user.start("run", "shell", "--", "sleep", "302", cwd=workspace)
    user.wait_running()
    (cgroup,) = left()
    for pid in (user.broker_pid, run.pid):
        os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert settled() == [] or not BY_SCOPE
    orphan = _orphan(cgroup)

    assert user.inside("true", cwd=workspace).returncode == 0
    assert orphan.wait(timeout=20) in {-signal.SIGTERM, -signal.SIGKILL}
    assert settled() == []
    user.close()


def _orphan(cgroup: str) -> subprocess.Popen[bytes]:
    """Start a process in the cgroup, or scope, of a run that is over; return when it is there."""
    argv = ["sleep", "303"]
    if BY_SCOPE:
        unit = os.path.basename(cgroup)
        argv = ["systemd-run", "--user", "--quiet", "--collect", "--scope", f"--unit={unit}", *argv]
    process = subprocess.Popen(argv)
    if not BY_SCOPE:
        os.makedirs(cgroup, exist_ok=True)
        Path(cgroup, "cgroup.procs").write_text(str(process.pid))
    until = time.monotonic() + 20
    while os.path.basename(cgroup) not in Path(f"/proc/{process.pid}/cgroup").read_text():
        assert time.monotonic() < until, "the orphan did not get there"
        time.sleep(0.05)
    return process
