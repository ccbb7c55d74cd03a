"""Warm starts and the verbs of virtual machines, with real guests, through the whole program."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cloister import User
from support.guest_user import Installs

POLICY = """\
schema = 1

[agents.shell]
preset = "shell"
isolation = "microvm"
environment_audit = false
microvm.image = "test"
microvm.memory = "256M"

[agents.cold]
preset = "shell"
isolation = "microvm"
environment_audit = false
microvm.image = "test"
microvm.memory = "256M"
microvm.warm = false
"""
LOOK = (
    "cat /proc/sys/kernel/random/uuid /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; date +%s; "
    "cat /proc/sys/kernel/random/boot_id"
)
BUSY = """
import time
for _ in range(7):
    print(time.time(), time.clock_getres(time.CLOCK_MONOTONIC), flush=True)
    end = time.process_time() + 1
    while time.process_time() < end:
        pass
"""
CLOCKS = "/sys/devices/system/clocksource/clocksource0"
TIMEOUT_S = 90


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, image: Installs) -> Iterator[User]:
    """A user with a template."""
    found = User(tmp_path_factory.mktemp("home"), POLICY)
    image.install(found.home)
    (found.home / "p").mkdir()
    (found.home / "p/a.txt").write_text("hello\n")
    done = found.run("vm", "warm", "shell", "--json", cwd=found.home, timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    yield found
    found.run("stop", "--all", "--grace", "1s", cwd=found.home)
    found.close()


@pytest.fixture
def project(user: User) -> Path:
    """The directory that machines start in."""
    return user.home / "p"


def vm(user: User, project: Path, *words: str) -> str:
    """Return what `cloister vm …` prints."""
    done = user.run("vm", *words, cwd=project, timeout_s=TIMEOUT_S)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def machines(user: User, project: Path) -> list[dict[str, Any]]:
    """Return the living machines."""
    found: list[dict[str, Any]] = json.loads(vm(user, project, "list", "--json"))
    return found


def running(user: User, project: Path, run: str) -> dict[str, Any]:
    """Wait until a machine's agent runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        for one in machines(user, project):
            if one["id"] == run and one["status"] == "running":
                return one
        time.sleep(0.2)
    raise AssertionError(f"{run} does not run")


def test_no_two_clones_share_what_must_differ(user: User, project: Path) -> None:
    """Machines from one template have UUIDs, machine ids and random numbers of their own, and the right time.

    Two things they do share, which docs/microvm.md says: the kernel's boot id, and where its code lies.
    """
    template = json.loads(vm(user, project, "snapshots", "--json"))
    assert [one["kind"] for one in template] == ["template"]
    seen = []
    for _ in range(2):
        done = user.run("run", "shell", "--", "sh", "-c", LOOK, cwd=project, timeout_s=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        uuid, machine_id, drawn, clock, boot = done.stdout.split("\n")[:5]
        assert abs(time.time() - int(clock)) < 30
        seen.append((uuid, machine_id, drawn, boot))
    one, other = seen
    assert not set(one[:3]) & set(other[:3])
    assert all(part.strip() for part in (*one, *other))
    plans = [json.loads(path.read_text()) for path in sorted(user.state.glob("runs/*/plan.json"))[-2:]]
    assert all(plan["steps"][-1]["vm"]["template"] for plan in plans)


@pytest.mark.slow
def test_a_changed_template_is_refused_and_made_again(user: User, project: Path) -> None:
    """A template with one changed byte starts nothing; the next start boots, and leaves a new one."""
    (memory,) = user.home.glob(".cache/cloister/vm/templates/*/memory")
    user.run("stop", "--all", "--grace", "1s", cwd=project)
    end_broker(user)
    memory.chmod(0o600)
    with memory.open("r+b") as file:
        file.seek(16 << 20)
        byte = file.read(1)
        file.seek(16 << 20)
        file.write(bytes([byte[0] ^ 1]))
    memory.chmod(0o400)
    done = user.run("run", "shell", "--", "true", cwd=project, timeout_s=TIMEOUT_S)
    assert done.returncode == 125
    assert "template-changed" in done.stderr
    assert not memory.exists()
    done = user.run("run", "shell", "--", "echo", "cold", cwd=project, timeout_s=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (0, "cold\n"), done.stderr
    deadline = time.monotonic() + TIMEOUT_S
    while not memory.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert memory.exists()


def test_a_machine_is_started_asked_kept_and_started_again(user: User, project: Path) -> None:
    """start, list, exec, cp both ways, stats, snapshot, restore, stop: each does what it says, and nothing is left."""
    run = vm(user, project, "start", "shell", "--mem", "256", "--", "sleep", "600").strip()
    listed = running(user, project, run)
    assert (listed["name"], listed["memory_mib"], listed["warm"]) == ("shell", 256, True)
    assert listed["pid"] > 0
    assert vm(user, project, "exec", "shell", "--", "cat", "/workspace/a.txt") == "hello\n"
    (project.parent / "in.txt").write_text("from outside\n")
    vm(user, project, "cp", str(project.parent / "in.txt"), "shell:/workspace/in.txt")
    vm(user, project, "cp", "shell:/workspace/in.txt", str(project.parent / "out.txt"))
    assert (project.parent / "out.txt").read_text() == "from outside\n"
    (stats,) = json.loads(vm(user, project, "stats", "--json"))
    assert stats["run"] == run
    assert 16 << 20 < stats["proportional_bytes"] < 512 << 20
    vm(user, project, "exec", "shell", "--", "sh", "-c", "echo kept > /var/tmp/note")
    kept = json.loads(vm(user, project, "snapshot", "shell", "before", "--json"))
    assert kept["name"] == "before"
    vm(user, project, "exec", "shell", "--", "sh", "-c", "echo later > /workspace/in.txt")
    second = vm(user, project, "restore", "before", "--", "sleep", "600").strip()
    running(user, project, second)
    assert second != run
    assert vm(user, project, "exec", second, "--", "cat", "/workspace/in.txt") == "from outside\n"
    assert vm(user, project, "exec", run, "--", "cat", "/workspace/in.txt") == "later\n"
    user.run("stop", run, second, "--grace", "1s", cwd=project, timeout_s=TIMEOUT_S)
    assert machines(user, project) == []
    for path, content in (("/workspace/in.txt", "from outside\n"), ("/var/tmp/note", "kept\n")):
        vm(user, project, "cp", f"before:{path}", str(project.parent / "kept.txt"))
        assert (project.parent / "kept.txt").read_text() == content
    gone = user.run("vm", "cp", f"{run}:/workspace/in.txt", str(project.parent / "none.txt"), cwd=project)
    assert "vm-disk-gone" in gone.stderr
    vm(user, project, "rm", "before")
    assert not list((user.state / "vm/snapshots").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["shell", "cold"], ids=["template", "boots"])
def test_a_guests_clock_does_not_fall_behind(user: User, project: Path, agent: str) -> None:
    """Its clock is the processor's counter, in steps of less than a microsecond, and goes as ours, also when busy."""
    run = vm(user, project, "start", agent, "--", "sleep", "600").strip()
    running(user, project, run)
    assert vm(user, project, "exec", run, "--", "cat", f"{CLOCKS}/current_clocksource") == "tsc\n"
    seen: list[tuple[float, ...]] = []
    with user.start("exec", "--no-pty", run, "--", "python3", "-c", BUSY, cwd=project) as telling:
        assert telling.stdout
        seen.extend((time.time(), *map(float, line.split())) for line in telling.stdout)
    user.run("stop", run, "--grace", "1s", cwd=project, timeout_s=TIMEOUT_S)
    first, last = seen[0], seen[-1]
    assert first[2] < 1e-6
    assert abs((last[1] - first[1]) / (last[0] - first[0]) - 1) < 0.2


FILL = """
memory = bytearray(100 << 20)
for at in range(0, len(memory), 4096):
    assert memory[at] == 0
    memory[at] = 1
"""


def taken(user: User, project: Path, run: str) -> dict[str, int]:
    """Return what a machine takes, in MiB."""
    (stats,) = json.loads(vm(user, project, "stats", run, "--json"))
    return {"own": stats["proportional_bytes"] >> 20, "balloon": stats["balloon_mib"]}


def until(user: User, project: Path, run: str, name: str, most: int) -> int:
    """Wait until a machine takes so little, and return how much that is."""
    deadline = time.monotonic() + TIMEOUT_S
    while (found := taken(user, project, run)[name]) > most and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def settled(user: User, project: Path, run: str) -> int:
    """Return the least of what a machine takes by itself within ten seconds, in MiB."""
    found = []
    for _ in range(20):
        found.append(taken(user, project, run)["own"])
        time.sleep(0.5)
    return min(found)


@pytest.mark.slow
def test_a_machine_from_a_template_gives_memory_back(user: User, project: Path) -> None:
    """What its guest has freed goes back to the host by itself, what a balloon takes does too, and can be had again.

    New memory in the guest is empty each time, though the host gives it back as the template had it. A second machine
    of the same template is not disturbed.
    """
    run, other = (vm(user, project, "start", "shell", "--", "sleep", "600").strip() for _ in range(2))
    for one in (run, other):
        running(user, project, one)
    # The first time the emulator translates that program, and the guest reads it: that stays.
    assert vm(user, project, "exec", run, "--", "python3", "-c", f"{FILL}\nprint('well')") == "well\n"
    before = settled(user, project, run)
    for _ in range(2):
        held = f"{FILL}\nimport sys; print('filled', flush=True); sys.stdin.read()"
        with user.start(
            "exec", "--no-pty", run, "--", "python3", "-c", held, cwd=project, stdin=subprocess.PIPE
        ) as filled:
            assert filled.stdin
            assert filled.stdout
            assert filled.stdout.readline().strip() == b"filled"
            assert taken(user, project, run)["own"] >= before + 80
            filled.stdin.close()
            assert filled.wait() == 0
        assert until(user, project, run, "own", before + 40) <= before + 40
    vm(user, project, "balloon", run, "160M")
    assert until(user, project, run, "balloon", 170) <= 170
    vm(user, project, "balloon", run, "256M")
    for one in (run, other):
        assert vm(user, project, "exec", one, "--", "python3", "-c", f"{FILL}\nprint('well')") == "well\n"
    user.run("stop", run, other, "--grace", "1s", cwd=project, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("words", "reference"),
    [(("start", "shell", "--mem", "512"), "memory-denied"), (("start", "shell", "--cpus", "2"), "cpus-denied"),
     (("start", "shell", "--model", "x"), "model-none"), (("restore", "nothing"), "snapshot-unknown"),
     (("stats", "last"), "run-not-alive")],
)  # fmt: skip
def test_what_the_policy_does_not_allow_is_refused(
    user: User, project: Path, words: tuple[str, ...], reference: str
) -> None:
    """A start with more than the policy says, of a model it has not, from a snapshot that is none: nothing starts."""
    done = user.run("vm", *words, cwd=project, timeout_s=TIMEOUT_S)
    assert done.returncode not in (0, 70), done.stderr
    assert reference in done.stderr


@pytest.mark.slow
def test_an_agent_that_wants_no_template_boots(user: User, project: Path) -> None:
    """`warm = false` boots each machine; its memory can be taken and given back while it lives."""
    run = vm(user, project, "start", "cold", "--", "sleep", "600").strip()
    assert running(user, project, run)["warm"] is False
    vm(user, project, "balloon", "cold", "160M")
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        (stats,) = json.loads(vm(user, project, "stats", "cold", "--json"))
        if stats["balloon_mib"] <= 170:
            break
        time.sleep(0.3)
    assert stats["balloon_mib"] <= 170
    done = user.run("vm", "balloon", "cold", "8G", cwd=project)
    assert "balloon-size" in done.stderr
    user.run("stop", run, "--grace", "1s", cwd=project, timeout_s=TIMEOUT_S)


def end_broker(user: User) -> None:
    """End the user's broker, so that the next start reads templates anew."""
    import os
    import signal

    from support.cloister import wait_for

    if user.broker_pid:
        descriptor = os.pidfd_open(user.broker_pid)
        os.kill(user.broker_pid, signal.SIGTERM)
        wait_for(descriptor)
        os.close(descriptor)
