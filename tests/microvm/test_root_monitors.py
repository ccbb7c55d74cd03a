"""Where root starts a microVM, nothing that meets the guest is root: keeper and monitor have the run's number."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.plan.vm import FIRST_NUMBER, NUMBERS, number_of
from microvm.conftest import GuestImage
from support.cloister import User
from support.firecracker_programs import install
from support.guest_user import BOOT_S

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("nothing_left")]
BASE = 'schema = 1\n[agents.shell]\npreset = "shell"\nisolation = "microvm"\nenvironment_audit = false\n'
MICROVM = (
    '[agents.shell.microvm]\nimage = "test"\nmemory = "256M"\nwarm = {warm}\nmonitor = "{monitor}"\nports = [8811]\n'
)
ALL_IDS = ("Uid", "Gid")
GROUP = 44444
"""Of the device that stands in for /dev/kvm."""


class Root(User):
    """Root, for whom another device stands in for /dev/kvm: this machine's is root's alone, or is not there."""

    device: Path | None = None

    def command(self, *words: str) -> list[str]:
        """Return the argv of `cloister WORDS`, in a mount namespace of its own where there is a device."""
        argv = super().command(*words)
        if self.device is None:
            return argv
        return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/kvm && exec "$@"', str(self.device), *argv]

    def own_device(self, path: Path, mode: int) -> bool:
        """Let a device that does nothing be /dev/kvm, with a group of its own; False where there is no place for it."""
        if not Path("/dev/kvm").exists():
            return False
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.chown(path, 0, GROUP)
        path.chmod(mode)
        self.device = path
        return True


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that nobody but root could have changed, as those of programs are; tests lie below another user's."""
    with tempfile.TemporaryDirectory(prefix="cloister-root-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def root(home: Path, image: GuestImage) -> Iterator[Root]:
    """Root, with the image."""
    user = Root(home, BASE + MICROVM.format(monitor="qemu", warm="false"))
    image.install(home)
    yield user
    user.close()


def status_of(pid: int) -> dict[str, str]:
    """Return the fields of a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def jailed(number: int) -> list[dict[str, str]]:
    """Return the status of each process that has a number."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                status = status_of(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(number) in status["Uid"].split():
                found.append(status)
    return found


def begin(root: Root, workspace: Path) -> str:
    """Start a detached run and return its id."""
    started = root.run("run", "-d", "shell", "--", "sleep", "600", cwd=workspace, timeout_s=BOOT_S)
    assert started.returncode == 0, started.stderr
    return started.stdout.strip()


def check_alive(root: User, run: str, workspace: Path, *, groups: str = "", warm: bool = False) -> None:
    """See that the run is under its number, that nothing of it is root, and that it is a run as any other."""
    number = number_of(run)
    assert FIRST_NUMBER <= number < FIRST_NUMBER + NUMBERS
    processes = jailed(number)
    assert len(processes) >= 2, "keeper and monitor"
    for status in processes:
        for name in ALL_IDS:
            assert status[name].split() == [str(number)] * 4, status
        assert status["Groups"] == groups
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    inside = 'test "$(id -u)" != 0 && echo kept > written && cat /run/cloister/box/CLOISTER.md >/dev/null; id -u'
    done = root.run("exec", run, "--", "sh", "-c", inside, cwd=workspace)
    assert (done.returncode, done.stdout.strip().isdigit()) == (0, True), done.stderr
    listed = json.loads(root.run("vm", "list", "--json", cwd=workspace).stdout)
    row = next(one for one in listed if one["id"] == run)
    assert (row["pid"] > 0, row["memory_mib"], row["warm"]) == (True, 256, warm), "its control socket is believed"
    ended = root.run("stop", run, cwd=workspace)
    assert ended.returncode == 0, ended.stderr
    assert (workspace / "written").read_text() == "kept\n"
    (workspace / "written").unlink()
    assert not jailed(number)


def test_a_monitor_that_root_starts_is_nobody(root: Root, workspace: Path) -> None:
    """Booted and from a template that root has made: QEMU and its keeper have the run's number, and no right at all."""
    check_alive(root, begin(root, workspace), workspace)
    root.write_policy(BASE + MICROVM.format(monitor="qemu", warm="true"))
    made = root.run("vm", "warm", "shell", cwd=workspace, timeout_s=BOOT_S)
    assert made.returncode == 0, made.stderr
    check_alive(root, begin(root, workspace), workspace, warm=True)


def test_firecracker_that_root_starts_is_nobody(root: Root, workspace: Path, place: Path) -> None:
    """The same with Firecracker, which opens again what it was given: files of the image, of a template, disks."""
    program = install(place)
    root.environment["PATH"] += f":{program.parent}"
    groups = str(GROUP) if root.own_device(place / "kvm", 0o660) else ""
    root.write_policy(BASE + MICROVM.format(monitor="firecracker", warm="false"))
    check_alive(root, begin(root, workspace), workspace, groups=groups)
    root.write_policy(BASE + MICROVM.format(monitor="firecracker", warm="true"))
    made = root.run("vm", "warm", "shell", cwd=workspace, timeout_s=BOOT_S)
    assert made.returncode == 0, made.stderr
    run = begin(root, workspace)
    kept = root.run("vm", "snapshot", run, "kept", "--json", cwd=workspace, timeout_s=BOOT_S)
    assert json.loads(kept.stdout)["memory"], kept.stderr
    check_alive(root, run, workspace, groups=groups, warm=True)
    back = root.run("vm", "restore", "kept", cwd=workspace, timeout_s=BOOT_S)
    assert back.returncode == 0, back.stderr
    check_alive(root, back.stdout.strip(), workspace, groups=groups)


def test_what_only_root_can_use_is_refused(root: Root, workspace: Path, place: Path) -> None:
    """A device or a monitor that is root's alone starts nothing: the monitor does not become root for it."""
    program = install(place)
    root.environment["PATH"] += f":{program.parent}"
    root.write_policy(BASE + MICROVM.format(monitor="firecracker", warm="false"))
    if root.own_device(place / "kvm", 0o600):
        refused = root.run("run", "shell", "--", "true", cwd=workspace, timeout_s=BOOT_S)
        assert (refused.returncode, "[kvm-closed]" in refused.stderr) == (125, True), refused.stderr
        (place / "kvm").chmod(0o666)
    program.chmod(0o700)
    refused = root.run("run", "shell", "--", "true", cwd=workspace, timeout_s=BOOT_S)
    assert (refused.returncode, "[program-private]" in refused.stderr) == (125, True), refused.stderr
