"""A living machine is kept with its memory, and its processes go on from there, with real guests."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import jws
from support.bound import HOST, SECRET, authorizations, credential, keep
from support.cloister import wait_for
from support.guest_user import BOOT_S, GuestUser, Installs
from support.secure_server import SecureServer, TestAuthority
from support.terminal import Terminal

COUNT = "exec 9>>/workspace/count; n=0; while :; do n=$((n+1)); echo $n >&9; echo $n > /tmp/now; sleep 0.2; done"
"""Counts in a variable, into a file that it holds open and into one in memory."""


PATIENCE_S = 90
POLICY = """\
schema = 1

[agents.shell]
preset = "shell"
isolation = "microvm"
environment_audit = false
command = ["/bin/sh"]
microvm.image = "test"
microvm.memory = "256M"
microvm.warm = false

[agents.shell.identity]
audiences = ["vault"]
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, image: Installs) -> Iterator[GuestUser]:
    """A user with a workspace."""
    found = GuestUser(tmp_path_factory.mktemp("home"), image)
    found.write_policy(POLICY)
    (found.home / "p").mkdir()
    (found.home / "p/a.txt").write_text("hello\n")
    yield found
    found.run("stop", "--all", "--grace", "1s", cwd=found.home)
    found.close()


@pytest.fixture
def project(user: GuestUser) -> Path:
    """The directory that machines start in."""
    return user.home / "p"


@pytest.fixture(scope="module")
def counting(user: GuestUser) -> str:
    """A run that counts, kept with its memory under the name `counting`."""
    run = user.begin(COUNT, cwd=user.home / "p")
    while now(user, run) < 3:
        time.sleep(0.1)
    kept = json.loads(vm(user, "snapshot", run, "counting", "--json"))
    assert kept["memory"] is True
    assert not kept["why"]
    return run


def vm(user: GuestUser, *words: str) -> str:
    """Return what `cloister vm …` prints."""
    done = user.run("vm", *words, cwd=user.home / "p", timeout_s=BOOT_S)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def shown(user: GuestUser, run: str, script: str) -> str:
    """Return what a script prints in a living guest."""
    done = user.exec(run, script, cwd=user.home / "p")
    assert done.returncode == 0, done.stderr
    return done.stdout


def now(user: GuestUser, run: str) -> int:
    """Return where the counter of a run stands."""
    return int(shown(user, run, "cat /tmp/now 2>/dev/null || echo 0") or "0")


def test_processes_go_on_from_where_they_stood(user: GuestUser, counting: str) -> None:
    """A counter goes on in the run that was kept and in the one that goes on from there; its file is still open.

    Each has its own id, machine, name, token and disk, and the right time.
    """
    stood = now(user, counting)
    other = vm(user, "restore", "counting").strip()
    look = "hostname; cat /etc/machine-id; cat $CLOISTER_IDENTITY_TOKEN_FILE"
    one, two = (shown(user, run, look).split() for run in (counting, other))
    assert len(one) == len(two) == 3
    assert not {*one[1:]} & {*two[1:]}
    assert json.loads(jws.unb64(two[2].split(".")[1]))["sub"].endswith(other)
    assert abs(int(shown(user, other, "date +%s")) - time.time()) < 30
    assert abs(int(shown(user, counting, "date +%s")) - time.time()) < 30
    first = now(user, other)
    shown(user, other, "echo mine > /workspace/mine; sleep 1")
    assert now(user, other) > first
    for run in (counting, other):
        lines = [int(line) for line in shown(user, run, "cat /workspace/count").split()]
        assert lines == list(range(1, len(lines) + 1))
    assert now(user, counting) > stood
    assert "mine" not in shown(user, counting, "ls /workspace").split()
    user.run("stop", other, "--grace", "1s", cwd=user.home / "p", timeout_s=BOOT_S)
    receipt = user.receipts()[-1]
    assert {"verdict=passed", "restored=renewed"} <= set(receipt["probe"])


@pytest.mark.slow
def test_what_was_changed_meanwhile_is_refused(user: GuestUser, counting: str) -> None:
    """Other walls, another size, a changed byte: nothing starts, and it is said why. As it was, it goes on again."""
    assert counting
    folder = user.home / "p"

    def refused(policy: str, reference: str, what: str) -> None:
        user.write_policy(policy)
        done = user.run("vm", "restore", "counting", cwd=folder, timeout_s=BOOT_S)
        user.write_policy(POLICY)
        assert done.returncode not in (0, 70), done.stdout
        assert reference in done.stderr
        assert what in done.stderr

    for change, reference, what in (
        ('hardening.landlock = "off"\n', "snapshot-strange", "walls"),
        ('filesystem.hide = ["~/x"]\n', "snapshot-strange", "policy for files"),
        ('workspace.protect = ["a.txt"]\n', "snapshot-strange", "policy for the workspace"),
        ('environment = {A = "b"}\n', "snapshot-strange", "environment"),
        ("hardening.write_execute = false\n", "snapshot-strange", "walls"),
    ):
        refused(POLICY.replace("[agents.shell.identity]", f"{change}[agents.shell.identity]"), reference, what)
    refused(POLICY.replace('memory = "256M"', 'memory = "192M"'), "memory-denied", "192")
    memory = user.state / "vm/snapshots/counting/memory"
    flip(memory)
    refused(POLICY, "snapshot-changed", "another content")
    flip(memory)
    record = memory.with_name("record.json")
    text = record.read_text()
    record.chmod(0o600)
    record.write_text(text.replace('"cpus":1', '"cpus":2'))
    refused(POLICY, "cpus-denied", "")
    record.write_text(text)
    record.chmod(0o400)
    assert now(user, vm(user, "restore", "counting").strip()) > 0


def flip(path: Path) -> None:
    """Change one byte in the middle of a file, or back."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o400)


@pytest.mark.slow
def test_disks_alone_begin_anew(user: GuestUser, counting: str) -> None:
    """`--disks` keeps no memory, or does not use it; another command begins as well. Each says so."""
    folder = user.home / "p"
    kept = json.loads(vm(user, "snapshot", counting, "disks", "--disks", "--json"))
    assert kept["memory"] is False
    assert not (user.state / "vm/snapshots/disks/memory").exists()
    for words in (("counting", "--disks"), ("disks", "--", "/bin/sh", "-c", COUNT)):
        done = user.run("vm", "restore", *words, cwd=folder, timeout_s=BOOT_S)
        assert done.returncode == 0, done.stderr
        assert "begins anew" in done.stderr
        run = done.stdout.strip()
        assert 0 <= now(user, run) < now(user, counting)
        user.run("stop", run, "--grace", "0s", cwd=folder, timeout_s=BOOT_S)


DRAW = "while :; do head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ' >> /tmp/drawn; sleep 0.05; done"


def test_forks_of_a_living_run_differ_in_what_must(tmp_path: Path, image: Installs) -> None:
    """Two forks of a machine from a template go on as it does; what they draw from then on, ids and keys differ."""
    user = GuestUser(tmp_path, image)
    user.write_policy(POLICY.replace("microvm.warm = false\n", ""))
    (tmp_path / "p").mkdir()
    try:
        vm(user, "warm", "shell")
        run = user.begin(DRAW, cwd=tmp_path / "p")
        shown(user, run, "until [ -s /tmp/drawn ]; do sleep 0.1; done")
        forks = vm(user, "fork", run, "-n", "2").split()
        assert len(forks) == 2
        assert not list((user.state / "vm/snapshots").iterdir())
        look = "cat /tmp/drawn; echo =; cat /etc/machine-id /proc/sys/kernel/random/uuid $CLOISTER_IDENTITY_TOKEN_FILE"
        drawn, keys = [], []
        for one in (run, *forks):
            first = len(shown(user, one, look).split("=", 1)[0].split())
            time.sleep(1)
            lines, _, rest = shown(user, one, look).partition("=\n")
            assert len(lines.split()) > first
            drawn.append(lines.split())
            keys.append(rest.split())
        common = set(drawn[0]) & set(drawn[1]) & set(drawn[2])
        assert common, "they began as one"
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert set(drawn[one]) & set(drawn[other]) == common
            assert len(keys[one]) == len(keys[other]) == 3
            assert not set(keys[one]) & set(keys[other])
        assert all(found[: len(common)] == drawn[0][: len(common)] for found in drawn)
    finally:
        user.run("stop", "--all", "--grace", "1s", cwd=tmp_path)
        user.close()


ASK = """
import os, ssl, sys, time, urllib.request as r
def ask():
    u = f"https://{sys.argv[1]}/x"
    return r.urlopen(r.Request(u, headers={"Authorization": "Bearer " + os.environ["TOKEN"]}), timeout=60).read()
count = 0
while True:
    if os.path.exists("/tmp/ask"):
        os.unlink("/tmp/ask")
        try:
            text = ask().decode()
        except Exception as error:
            text = repr(error) + getattr(error, "read", bytes)().decode()
        count += 1
        open("/tmp/answer.new", "w").write(f"{count} {text}")
        os.rename("/tmp/answer.new", f"/tmp/answer{count}")
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_former_placeholder_works_in_the_run_that_goes_on(home: Path, workspace: Path, image: Installs) -> None:
    """The process asks with the placeholder that it was started with: its run is over, and the new one knows it.

    A command that is started then gets one of its own. The run that goes on is kept again, with all of it, and what
    goes on from there knows the first run's. Where the policy grants the credential no more, none works.
    """
    user = GuestUser(home, image)
    authority = TestAuthority(home / "pki")
    user.environment["SSL_CERT_FILE"] = str(authority.file)
    with SecureServer(authority.context(HOST)) as server:
        base = (home / ".config/cloister/cloister.toml").read_text()
        base += f'[agents.shell.egress]\nallow = ["{HOST}:{server.port}"]\n'
        granted = base + credential(keep(user), server.port)
        user.write_policy(granted)
        (workspace / "ask.py").write_text(ASK)
        try:
            run = user.begin(f"exec python3 ask.py {HOST}:{server.port}", cwd=workspace)
            wait = "touch /tmp/ask; until [ -e /tmp/answer{0} ]; do sleep 0.1; done; cat /tmp/answer{0}"
            assert user.exec(run, wait.format(1), cwd=workspace).stdout.startswith("1 hello")
            before = user.exec(run, "echo $TOKEN", cwd=workspace).stdout
            for name in ("one", "two"):
                done = user.run("vm", "snapshot", run, name, cwd=workspace, timeout_s=BOOT_S)
                assert done.returncode == 0, done.stderr
            record = (user.state / "vm/snapshots/one/record.json").read_text()
            assert before.strip() in record
            assert SECRET not in record
            stopped = user.run("stop", run, "--grace", "0s", cwd=workspace, timeout_s=BOOT_S)
            assert stopped.returncode == 0, stopped.stderr
            other = user.run("vm", "restore", "one", cwd=workspace, timeout_s=BOOT_S)
            assert other.returncode == 0, other.stderr
            other_id = other.stdout.strip()
            assert user.exec(other_id, wait.format(2), cwd=workspace).stdout.startswith("2 hello")
            after = user.exec(other_id, "echo $TOKEN", cwd=workspace).stdout
            assert after.startswith("cloister-")
            assert after != before
            assert authorizations(server) == [f"Bearer {SECRET}"] * 2
            third = _kept_again(user, workspace, other_id)
            assert user.exec(third, wait.format(3), cwd=workspace).stdout.startswith("3 hello")
            assert user.exec(third, "cat /var/tmp/mine; echo $TOKEN", cwd=workspace).stdout.split()[0] == "mine"
            assert authorizations(server) == [f"Bearer {SECRET}"] * 3
            user.write_policy(base)
            user.run("policy", "reload", cwd=workspace)
            refused = user.exec(third, wait.format(4), cwd=workspace).stdout
            assert refused.startswith("4 ")
            assert "hello" not in refused
            assert authorizations(server) == [f"Bearer {SECRET}"] * 3
        finally:
            user.run("stop", "--all", "--grace", "0s", cwd=workspace)
            user.close()


def _kept_again(user: GuestUser, workspace: Path, run: str) -> str:
    """Keep a run that came from a snapshot, end it, and return the one that goes on from there."""
    user.exec(run, "echo mine > /var/tmp/mine; sync", cwd=workspace)
    kept = user.run("vm", "snapshot", run, "three", "--json", cwd=workspace, timeout_s=BOOT_S)
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout)["memory"] is True
    stopped = user.run("stop", run, "--grace", "0s", cwd=workspace, timeout_s=BOOT_S)
    assert stopped.returncode == 0, stopped.stderr
    other = user.run("vm", "restore", "three", cwd=workspace, timeout_s=BOOT_S)
    assert other.returncode == 0, other.stderr
    ended = user.state / f"runs/{run}/receipt.json"
    until = time.monotonic() + PATIENCE_S
    while not ended.exists() and time.monotonic() < until:
        time.sleep(0.1)
    receipt = json.loads(ended.read_text())
    assert receipt["probe"].count("restored=renewed") == 1
    return other.stdout.strip()


@pytest.mark.slow
def test_a_terminal_goes_on_in_another_one(tmp_path: Path, image: Installs) -> None:
    """Whoever attaches to a kept agent has its terminal, at their size, with its modes; it goes on unattended too."""
    user = GuestUser(tmp_path, image)
    (tmp_path / "p").mkdir()
    loop = 'while :; do read line && i=$((i+1)) && echo "<$i $line>"; done'
    script = f"trap 'stty size' WINCH; stty -echo; i=0; echo ready; {loop}"
    try:
        argv = user.command("run", "shell", "--", "/bin/sh", "-c", script)
        with Terminal(argv, cwd=tmp_path / "p", env=user.environment) as one:
            one.until("ready", timeout_s=PATIENCE_S)
            one.type("a\n")
            one.until("<1 a>", timeout_s=PATIENCE_S)
            (run,) = [record["id"] for record in user.records()]
            vm(user, "snapshot", run, "typing")
            one.type("b\n")
            one.until("<2 b>", timeout_s=PATIENCE_S)
            argv = user.command("vm", "restore", "--attach", "typing")
            with Terminal(argv, cwd=tmp_path / "p", env=user.environment, size=(33, 99)) as two:
                two.until("33 99", timeout_s=PATIENCE_S)
                two.type("c\n")
                assert "c" not in two.until("<2 ", timeout_s=PATIENCE_S)
                two.until("c>", timeout_s=PATIENCE_S)
                two.resize(20, 70)
                two.until("20 70", timeout_s=PATIENCE_S)
            alone = vm(user, "restore", "typing").strip()
            listed = {record["id"]: record["status"] for record in user.records()}
            assert listed[alone] == "running"
            assert shown(user, alone, "echo there") == "there\n"
    finally:
        user.run("stop", "--all", "--grace", "0s", cwd=tmp_path)
        user.close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["monitor", "keeper", "broker"])
def test_whoever_is_killed_while_it_is_kept(tmp_path: Path, image: Installs, victim: str) -> None:
    """The monitor, the keeper or the broker is killed amid the standstill: no snapshot, and nothing of one later."""
    user = GuestUser(tmp_path, image)
    (tmp_path / "p").mkdir()
    try:
        run = user.begin(COUNT, cwd=tmp_path / "p")
        monitor = next(one["pid"] for one in json.loads(vm(user, "list", "--json")) if one["id"] == run)
        parent = int(Path(f"/proc/{monitor}/stat").read_text().rpartition(")")[2].split()[1])
        pids = {"monitor": monitor, "keeper": parent, "broker": user.broker_pid}
        ended = os.pidfd_open(monitor)
        taking = user.start("vm", "snapshot", run, "cut", cwd=tmp_path / "p")
        made = user.state / "vm/snapshots/.making-cut/memory"
        end = time.monotonic() + PATIENCE_S
        while not made.exists() and taking.poll() is None:
            assert time.monotonic() < end
        os.kill(pids[victim], signal.SIGKILL)
        assert taking.wait(PATIENCE_S) != 0
        wait_for(ended, PATIENCE_S)
        os.close(ended)
        assert "cut" not in [one["name"] for one in json.loads(vm(user, "snapshots", "--json"))]
        assert not list((user.state / "vm/snapshots").iterdir())
        assert user.run("run", "shell", "--", "echo", "next", cwd=tmp_path / "p", timeout_s=BOOT_S).stdout == "next\n"
    finally:
        user.run("stop", "--all", "--grace", "0s", cwd=tmp_path)
        user.close()
