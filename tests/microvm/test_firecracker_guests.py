"""Firecracker's driver against a look-alike that boots the tests' real guest: API, channel, snapshots, whole runs.

There is no KVM where these tests are run, so they have never met the real one. Where CLOISTER_FIRECRACKER names a
Firecracker and KVM boots guests, the last ones use it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cloister.host.firecracker import FirecrackerApi
from cloister.host.firecracker_probe import try_boot
from cloister.host.frames import Channel
from cloister.host.vm_link import greet, hello, new_nonce
from cloister.isolation import firecracker
from cloister.isolation.qemu import command_line
from cloister.plan.vm import VmFile, VmLaunch
from cloister.runs.vm_firecracker import FirecrackerDriver
from microvm.conftest import GuestImage
from support.cloister import User
from support.firecracker_programs import install
from support.firecracker_rig import Rig
from support.terminal import Terminal

REAL = os.environ.get("CLOISTER_FIRECRACKER", "")
PATIENCE_S = 180
MICROVM = '[agents.shell.microvm]\nimage = "test"\nmemory = "256M"\nwarm = false\nmonitor = "{monitor}"\n'
BASE = 'schema = 1\n[agents.shell]\npreset = "shell"\nisolation = "microvm"\nenvironment_audit = false\n'
AFTER = "not supported after starting"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The look-alike, as `firecracker` in a directory of its own."""
    return install(tmp_path_factory.mktemp("firecracker"))


@pytest.fixture
def user(home: Path, image: GuestImage, program: Path) -> Iterator[User]:
    """A user with the image and a Firecracker on the PATH, whose agent asks for it by name."""
    user = User(home, BASE + MICROVM.format(monitor="firecracker"))
    user.environment["PATH"] += f":{program.parent}"
    image.install(home)
    yield user
    user.close()


@pytest.fixture
def plain(home: Path, image: GuestImage) -> Iterator[User]:
    """A user with the image and without a Firecracker."""
    user = User(home, BASE + MICROVM.format(monitor="firecracker"))
    image.install(home)
    yield user
    user.close()


class Guests:
    """Guests of one image in one directory, each with a process and a driver; disks are made small and empty."""

    def __init__(self, program: Path, image: GuestImage, directory: Path) -> None:
        self.program, self.image, self.directory = program, image, directory
        for name in ("var", "workspace"):
            (directory / name).write_bytes(bytes(1 << 20))
        paths = {
            "kernel": image.path / "vmlinux", "initramfs": image.path / "initramfs.cpio",
            "root": image.path / "root.img", "var": directory / "var", "workspace": directory / "workspace",
        }  # fmt: skip
        self.files = [(path, role in {"var", "workspace"}) for role, path in paths.items()]
        self.launch = VmLaunch(
            image="test", version=1, manifest="", monitor="firecracker", accelerator="kvm", memory_mib=256, cpus=1,
            files=tuple(VmFile(role=role, path=str(path)) for role, path in paths.items()),  # type: ignore[arg-type]
            fields=(), inner=(), directory=str(directory), disk_bytes=1,
        )  # fmt: skip

    def start(self) -> tuple[Rig, FirecrackerDriver]:
        """Start a process, with nothing in it yet, and return its driver."""
        rig = Rig(self.program, self.directory, files=self.files)
        root = self.image.manifest.root
        verity = f"{root.data_blocks}:{root.hash_start}:{root.root_hash}:{root.salt}"
        machine = firecracker.Machine(
            cmdline=command_line(self.image.manifest.cmdline, verity=verity, clock_khz=0),
            disks=firecracker.Rate(bytes_per_s=1 << 30),
            snapshots=True,
        )
        place = firecracker.Place(directory=str(self.directory))
        return rig, FirecrackerDriver(FirecrackerApi(str(rig.socket)), self.launch, machine, place)


@pytest.fixture
def guests(program: Path, image: GuestImage, tmp_path: Path) -> Guests:
    """Guests over the look-alike."""
    return Guests(program, image, tmp_path)


def greeted(link: socket.socket) -> tuple[str, ...]:
    """Say hello to a guest over its channel, and return what it says of itself."""
    channel, nonce = Channel(link), new_nonce()
    link.settimeout(None)
    greet(channel, nonce)
    words = hello(channel, nonce, timeout_s=60)
    assert words
    return words


def test_boot_pause_snapshot_and_restore(guests: Guests, image: GuestImage) -> None:
    """The driver boots the real guest, holds it, and restores it in another process; each time the channel leads to it.

    What the API refuses while a machine lives is refused by the look-alike as Firecracker does.
    """
    rig, driver = guests.start()
    try:
        asyncio.run(driver.configure())
        with rig.connect(within_s=60) as link:
            assert f"verity={image.manifest.root.root_hash}" in greeted(link)
        refused = [
            rig.ask("PUT", "/boot-source", {"kernel_image_path": "/proc/self/fd/5"}),
            rig.ask("PUT", "/drives/more", {"drive_id": "more", "is_root_device": False, "path_on_host": "/dev/null"}),
            rig.ask("PUT", "/vsock", {"guest_cid": 4, "uds_path": "other"}),
            rig.ask("PUT", "/actions", {"action_type": "InstanceStart"}),
        ]
        assert [(status, AFTER in fault) for status, fault in refused] == [(400, True)] * 4
        running = {"snapshot_path": str(guests.directory / "x"), "mem_file_path": str(guests.directory / "y")}
        assert "not paused" in rig.ask("PUT", "/snapshot/create", running)[1]

        asyncio.run(held(driver, guests.directory))
        asyncio.run(driver.ask_to_end())
        assert rig.process.wait(60) == 0
    finally:
        rig.close()

    rig, driver = guests.start()
    try:
        began = time.monotonic()
        asyncio.run(driver.restore("state", "memory", resume=True))
        with rig.connect(within_s=30) as link:
            assert f"verity={image.manifest.root.root_hash}" in greeted(link)
        assert time.monotonic() - began < 30
    finally:
        rig.close()


async def held(driver: FirecrackerDriver, directory: Path) -> None:
    """Pause, take a snapshot, let go on."""
    await driver.pause()
    assert await driver._api.state() == "Paused"
    await driver.snapshot("state", "memory")
    assert (directory / "memory").stat().st_size > 1 << 20
    await driver.balloon(16)
    await driver.resume()
    assert await driver._api.state() == "Running"


def test_a_run(user: User, workspace: Path) -> None:
    """`cloister run` in Firecracker: output, exit code and workspace are those of any run; P-820."""
    (workspace / "before").write_text("old\n")
    script = "cat before; echo new > after; cat /proc/cmdline >&2; ls /sys/block | tr '\\n' ' '; exit 7"
    ended = user.run("run", "shell", "--", "sh", "-c", script, cwd=workspace, timeout_s=PATIENCE_S)

    assert (ended.returncode, ended.stdout) == (7, "old\ndm-0 vda vdb vdc "), ended.stderr
    assert "virtio_mmio.device=" in ended.stderr, "it did not run in the look-alike"
    assert "root=" not in ended.stderr
    (receipt,) = user.receipts()
    assert receipt["exit_code"] == 7


def test_a_run_from_a_template(user: User, workspace: Path) -> None:
    """A machine of Firecracker is made a template of, and runs start from it: with their own disks, names, randomness.

    Nothing is left of the maker; what their disks may move is bounded as for a machine that boots.
    """
    user.write_policy(BASE + MICROVM.format(monitor="firecracker").replace("warm = false", 'disk_rate = "16M"'))
    made = user.run("vm", "warm", "shell", "--json", cwd=workspace, timeout_s=PATIENCE_S)
    assert made.returncode == 0, made.stderr
    (template,) = user.home.glob(".cache/cloister/vm/templates/*")
    assert sorted(path.name for path in template.iterdir()) == ["memory", "record.json", "state"]
    assert '"program":"/' in (template / "record.json").read_text()

    (workspace / "before").write_text("old\n")
    look = "cat /proc/sys/kernel/random/uuid /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; cat before"
    seen = []
    for number in range(2):
        script = f"{look}; echo {number} > after; time -p sh -c 'head -c 64M /dev/zero > /var/tmp/x; sync'; exit 7"
        ended = user.run("run", "shell", "--", "bash", "-c", script, cwd=workspace, timeout_s=PATIENCE_S)
        assert ended.returncode == 7, ended.stderr
        assert float(ended.stderr.split("real")[1].split()[0]) > 2, "64 MiB at 16 MiB a second"
        assert (workspace / "after").read_text() == f"{number}\n"
        seen.append(ended.stdout.split("\n"))
    assert not set(seen[0][:3]) & set(seen[1][:3])
    assert [one[3] for one in seen] == ["old", "old"]
    plans = [json.loads(path.read_text())["steps"][-1]["vm"] for path in user.state.glob("runs/*/plan.json")]
    assert [(plan["monitor"], bool(plan["template"])) for plan in plans] == [("firecracker", True)] * 2


def test_it_ends_with_its_monitor(user: User, workspace: Path) -> None:
    """A Firecracker that is killed ends the run at once and leaves nothing; until then commands can join it."""
    run = user.start("run", "shell", "--", "sh", "-c", "echo ready; sleep 1000", cwd=workspace)
    try:
        (record,) = user.wait_running(timeout_s=PATIENCE_S)
        joined = user.run("exec", record["id"], "--", "sh", "-c", "id -u; exit 5", cwd=workspace, timeout_s=PATIENCE_S)
        assert (joined.returncode, joined.stdout) == (5, f"{os.getuid() or 1000}\n"), joined.stderr
        pid = monitor_of(record["id"])
        os.kill(pid, signal.SIGKILL)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 125, err
    assert b"ready" in out
    until = time.monotonic() + 20
    while list(user.runtime.glob("cloister/runs/*")) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(user.runtime.glob("cloister/runs/*")) == []


def test_verbs_of_machines(user: User, workspace: Path) -> None:
    """`list`, `stats`, `balloon` and snapshots of the disks: as with QEMU, by the API; the guest goes on afterwards."""

    def verb(*words: str) -> str:
        done = user.run("vm", *words, cwd=workspace, timeout_s=PATIENCE_S)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    (workspace / "before").write_text("old\n")
    run = verb("start", "shell", "--", "sh", "-c", "echo kept > made; sleep 1000").strip()
    pid = monitor_of(run)
    assert [(one["pid"], one["monitor"]) for one in json.loads(verb("list", "--json"))] == [(pid, "firecracker")]
    verb("balloon", run, "128M")
    (figures,) = json.loads(verb("stats", "--json"))
    assert (figures["pid"], figures["balloon_mib"], figures["memory_mib"]) == (pid, 128, 256)
    assert figures["resident_bytes"] > 1 << 20
    refused = user.run("vm", "balloon", run, "1G", cwd=workspace)
    assert (refused.returncode, "[balloon-size]" in refused.stderr) == (64, True)

    kept = json.loads(verb("snapshot", run, "one", "--disks", "--json"))
    assert (kept["memory"], kept["why"]) == (False, "")
    joined = user.run("exec", run, "--", "cat", "made", cwd=workspace, timeout_s=PATIENCE_S)
    assert (joined.returncode, joined.stdout) == (0, "kept\n"), joined.stderr
    verb("stop", run, "--grace", "1s")
    assert "kept\n" in verb("restore", "--attach", "--disks", "one", "--", "cat", "made")


COUNT = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /tmp/now; sleep 0.05; done"


def test_a_living_machine_is_kept_with_its_memory(user: User, workspace: Path) -> None:
    """A counter and a terminal go on in the run that was kept, by another connection; nothing is lost or comes twice.

    What goes on from there, forks and a restored run, is somebody else: another machine-id, other randomness, the same
    processes. A restored run is kept as well.
    """
    out = user.home / "counted"
    with out.open("wb") as counted:
        agent = user.start("run", "shell", "--", "sh", "-c", COUNT, cwd=workspace, stdout=counted)
    (record,) = user.wait_running(timeout_s=PATIENCE_S)
    run, verb = record["id"], partial(ask, user, workspace)
    reader = user.command("exec", run, "--", "sh", "-c", 'stty -echo; while read a; do echo "<$a>"; done')
    try:
        with Terminal(reader, cwd=workspace, env=user.environment) as terminal:
            terminal.type("one\n")
            terminal.until("<one>", timeout_s=PATIENCE_S)
            kept = json.loads(verb("snapshot", run, "one", "--json"))
            assert (kept["memory"], kept["why"]) == (True, "")
            terminal.type("two\n")
            terminal.until("<two>", timeout_s=PATIENCE_S)
            forks = verb("fork", run, "-n", "2").split()
            terminal.type("three\n")
            terminal.until("<three>", timeout_s=PATIENCE_S)
        restored = verb("restore", "one").strip()
        assert json.loads(verb("snapshot", restored, "two", "--json"))["memory"] is True
        go_on_as_others(user, workspace, run, (*forks, restored))
        refuse_what_was_changed(user, workspace, user.state / "vm/snapshots/one")
    finally:
        user.run("stop", "--all", "--grace", "0s", cwd=workspace, timeout_s=PATIENCE_S)
        agent.wait(60)
    lines = out.read_text().split()
    assert [int(line) for line in lines] == list(range(1, len(lines) + 1)), "nothing was lost, nothing came twice"
    assert len(lines) > 20


TAKEN_OVER = """
import os
from firecracker_alike.bridge import Bridge
from firecracker_alike.models import FaultError
from firecracker_alike.server import Firecracker
good, calls = Firecracker._create_snapshot, []
def create(self, body):
    calls.append(body)
    memory, state = body["mem_file_path"], body["snapshot_path"]
    if len(calls) == 1:
        return
    if len(calls) == 2:
        os.truncate(memory, 1 << 31)
        open(state, "w").write("x")
        return
    if len(calls) == 3:
        for name in ("memory", "state", "memory.out"):
            os.symlink("/etc/passwd", f"/run/cloister/vm/{name}")
        raise FaultError("there is no room")
    good(self, body)
    if len(calls) == 5:
        END
Firecracker._create_snapshot = create
"""
ENDS = {"it dies": "os._exit(3)", "nobody answers any more": "Bridge._talk = lambda self, client: client.close()"}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_monitor_that_was_taken_over_while_it_is_kept(plain: User, workspace: Path, tmp_path: Path, end: str) -> None:
    """It writes nothing, too much, or links, and says that it was good: no snapshot, and the run goes on each time.

    One that dies amid it ends the run, as one does behind which the guest is not to be met again; nothing hangs.
    """
    (tmp_path / "bin").mkdir()
    twisted = install(tmp_path / "bin", twist=TAKEN_OVER.replace("END", ENDS[end]))
    plain.environment["PATH"] += f":{twisted.parent}"
    agent = plain.start("run", "shell", "--", "sh", "-c", COUNT, cwd=workspace, stdout=subprocess.DEVNULL)
    (record,) = plain.wait_running(timeout_s=PATIENCE_S)
    taken = partial(plain.run, "vm", "snapshot", record["id"], "one", cwd=workspace, timeout_s=PATIENCE_S)
    snapshots = plain.state / "vm/snapshots"
    try:
        for what in ("a memory of 0 bytes", "a memory of 2147483648 bytes", "there is no room"):
            done = taken()
            assert (done.returncode, what in done.stderr) == (71, True), done.stderr
            assert list(snapshots.iterdir()) == []
            assert len(shown_later(plain, workspace, record["id"])) == 2
        assert taken().returncode == 0
        ask(plain, workspace, "rm", "one")
        assert len(shown_later(plain, workspace, record["id"])) == 2
        done = taken()
        assert (done.returncode == 0) is (end != "it dies"), done.stderr
        _, complaint = agent.communicate(timeout=60)
        assert agent.returncode == 125
        assert ("guest-silent" if done.returncode == 0 else "monitor-died") in complaint.decode(), complaint
        assert [path.name for path in snapshots.iterdir()] == (["one"] if done.returncode == 0 else [])
    finally:
        agent.kill()
        agent.wait()


def shown_later(user: User, workspace: Path, run: str) -> set[str]:
    """Return what the counter shows, at two moments."""
    look = ("exec", run, "--", "sh", "-c", "cat /tmp/now; sleep 0.5; cat /tmp/now")
    done = user.run(*look, cwd=workspace, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def ask(user: User, workspace: Path, *words: str) -> str:
    """Return what `cloister vm` prints."""
    done = user.run("vm", *words, cwd=workspace, timeout_s=PATIENCE_S)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def go_on_as_others(user: User, workspace: Path, run: str, others: tuple[str, ...]) -> None:
    """Have every counter count, in machines of which no two are one."""

    def shown(one: str, script: str) -> list[str]:
        done = user.run("exec", one, "--", "sh", "-c", script, cwd=workspace, timeout_s=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    seen = [shown(one, "cat /etc/machine-id /proc/sys/kernel/random/uuid /tmp/now") for one in (run, *others)]
    assert len(others) == 3
    assert len({one[0] for one in seen}) == len({one[1] for one in seen}) == 4
    for one, (_, _, first) in zip((run, *others), seen, strict=True):
        assert 1 < int(first) < int(shown(one, "sleep 1; cat /tmp/now")[0])


def refuse_what_was_changed(user: User, workspace: Path, snapshot: Path) -> None:
    """A byte of the memory or of the state, other walls: nothing starts, and it is said why."""
    assert (snapshot / "memory").stat().st_size == 256 << 20
    assert (snapshot / "memory").stat().st_blocks * 512 < 256 << 20

    def refused() -> str:
        done = user.run("vm", "restore", "one", cwd=workspace, timeout_s=PATIENCE_S)
        assert done.returncode not in (0, 70), done.stdout
        return done.stderr

    for name in ("memory", "state"):
        path = snapshot / name
        data = path.read_bytes()
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(len(data) // 2)
            file.write(bytes([data[len(data) // 2] ^ 1]))
        assert "snapshot-changed" in refused()
        path.write_bytes(data)
        path.chmod(0o400)
    policy = BASE + MICROVM.format(monitor="firecracker")
    for other, what in (
        (policy.replace("[agents.shell.m", '[agents.shell.hardening]\nlandlock = "off"\n[agents.shell.m'), "walls"),
        (policy.replace('"firecracker"', '"qemu"'), "monitor"),
        (policy.replace("256M", "192M"), "memory"),
    ):
        user.write_policy(other)
        assert what in refused()
    user.write_policy(policy)


def monitor_of(run: str) -> int:
    """Return the pid of the look-alike that serves a run."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0") if path.exists() else []
        if b"--api-sock" in words and run.encode() in words and b"/run/cloister/firecracker" in words[:3]:
            return int(path.parent.name)
    raise AssertionError("there is no firecracker")


@pytest.mark.parametrize("monitor", ["qemu", pytest.param("firecracker", marks=pytest.mark.slow)])
def test_disks_keep_to_their_rate(user: User, workspace: Path, monitor: str) -> None:
    """With `disk_rate` what an agent writes goes to the disk no faster; the plan says so."""
    user.write_policy(BASE + MICROVM.format(monitor=monitor) + 'disk_rate = "16M"\n')
    write = "time -p dd if=/dev/zero of=big bs=1M count=64 conv=fsync 2>/dev/null; rm big"
    ended = user.run("run", "shell", "--", "bash", "-c", write, cwd=workspace, timeout_s=PATIENCE_S)

    assert ended.returncode == 0, ended.stderr
    seconds = float(ended.stderr.split("real")[1].split()[0])
    assert seconds > 2, "64 MiB at 16 MiB a second, those of the first second at once"
    shown = user.run("plan", "shell", "--", "true", cwd=workspace, timeout_s=PATIENCE_S)
    assert "disk_rate 16M" in shown.stdout


def test_asked_for_by_name_and_not_there(plain: User, workspace: Path) -> None:
    """Without a Firecracker a policy that names it is refused; with `auto` QEMU takes the run."""
    refused = plain.run("run", "shell", "--", "true", cwd=workspace, timeout_s=PATIENCE_S)
    assert refused.returncode == 125
    assert "[firecracker-unavailable]" in refused.stderr

    plain.write_policy(BASE + MICROVM.format(monitor="auto"))
    shown = plain.run("plan", "--json", "shell", "--", "true", cwd=workspace, timeout_s=PATIENCE_S)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["steps"][-1]["vm"]["monitor"] == "qemu"


def test_one_that_boots_nothing(plain: User, workspace: Path, tmp_path: Path) -> None:
    """A Firecracker that is there and boots no guest, as on a host without KVM, is refused before anything is made."""
    broken = tmp_path / "bin" / "firecracker"
    broken.parent.mkdir()
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo "Firecracker v1.16.1"\necho "no /dev/kvm here" >&2; exit 1\n'
    )
    broken.chmod(0o755)
    plain.environment["PATH"] += f":{broken.parent}"
    refused = plain.run("run", "shell", "--", "true", cwd=workspace, timeout_s=PATIENCE_S)

    assert refused.returncode == 125
    assert "[firecracker-unavailable]" in refused.stderr
    assert "no /dev/kvm here" in refused.stderr
    assert plain.receipts() == []


real = pytest.mark.skipif(not REAL, reason="CLOISTER_FIRECRACKER names no Firecracker")


@real
def test_the_real_one_boots(image: GuestImage) -> None:
    """The probe boots a guest with the real Firecracker, and greets it."""
    verdict = try_boot(REAL, str(image.path / "vmlinux"), str(image.path / "initramfs.cpio"))

    assert verdict.seconds, verdict.why


@real
def test_the_real_one_by_the_driver(image: GuestImage, tmp_path: Path) -> None:
    """The same requests boot, hold and restore a guest in the real Firecracker."""
    test_boot_pause_snapshot_and_restore(Guests(Path(REAL), image, tmp_path), image)


@real
def test_a_run_in_the_real_one(plain: User, workspace: Path) -> None:
    """The same run in the real Firecracker."""
    plain.environment["PATH"] += f":{Path(REAL).parent}"
    test_a_run(plain, workspace)


@real
def test_a_living_machine_of_the_real_one(plain: User, workspace: Path) -> None:
    """The same machine kept, met again and forked, by the real Firecracker: whatever it does to the connection."""
    plain.environment["PATH"] += f":{Path(REAL).parent}"
    test_a_living_machine_is_kept_with_its_memory(plain, workspace)
