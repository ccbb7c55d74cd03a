"""The monitor of a microVM in its run's cgroup, on a real cgroup v2 tree: QEMU with KVM, in an emulated machine.

A boot takes long here, so most tests look at one guest. What its monitor is made to do by QMP is what a guest that
has taken it over could do: it is the monitor of that run, in that cgroup, and nothing stands in for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_limits_in_force import BY_SCOPE, left, settled

from cloister.host import qmp
from support.guest_image import CarriedImage, see_kvm
from support.guest_user import GuestUser
from support.homes import make_home, make_workspace

BOOT_S = 400
MIB = 1 << 20
AROUND = (256 + 192) * MIB
"""Memory of the guest, and what its monitor has beside it with KVM."""
MOST = AROUND + MIB
"""What must not fail is charged beyond the limit by a few pages (mm/memcontrol.c)."""
TASKS = 512
SLACK = 4 * MIB
"""The kernel keeps counts of each thread aside (SPLIT_RSS_COUNTING), and of each processor."""
WAY = "cgroup (systemd scope)" if BY_SCOPE else "cgroup"
TOUCH = "import sys, time\nkept = b'x' * (int(sys.argv[1]) << 20)\nprint('held', flush=True)\ntime.sleep(600)\n"

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.timeout(900)]


class Living(NamedTuple):
    """A run whose guest lives, and its cgroup."""

    user: GuestUser
    workspace: Path
    run: str
    cgroup: Path

    def number(self, file: str, key: str = "") -> int:
        """Return a number that the kernel has of the cgroup; `key` where a file has several."""
        for line in (self.cgroup / file).read_text().splitlines():
            words = line.split()
            if not key or words[0] == key:
                return int(words[-1])
        raise AssertionError(f"{file} has no {key}")

    def say(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the guest, as the agent."""
        words = ("exec", self.run, "--", "/bin/sh", "-c", script)
        return self.user.run(*words, cwd=self.workspace, timeout_s=BOOT_S)

    def processes(self) -> dict[int, str]:
        """Return the processes of the cgroup, by number: their names.

        Without the kernel's own: KVM starts a thread for each machine in the cgroup of its monitor.
        """
        pids = [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]
        named = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids}
        return {pid: name for pid, name in named.items() if not name.startswith("kvm-")}

    def monitor(self) -> int:
        """Return the monitor's process."""
        return next(pid for pid, name in self.processes().items() if name.startswith("qemu-system"))

    def resident(self) -> int:
        """Return the anonymous memory that its processes have, by their own page tables."""
        return sum(_field(pid, "RssAnon") << 10 for pid in self.processes())

    def ask(self) -> qmp.Qmp:
        """Return a conversation with the monitor."""
        return qmp.connect(f"{self.user.runtime}/cloister/runs/{self.run}/vm/qmp.sock", timeout_s=300)


def _field(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _policy(limits: str) -> str:
    return f'[agents.shell.limits]\nenforce = "cgroup"\n{limits}'


def _begin(image: CarriedImage, place: Path, limits: str) -> Living:
    home = make_home(place / "home")
    workspace = make_workspace(home / "src/project")
    user = GuestUser(home, image, _policy(limits))
    assert see_kvm(home, user.runtime) == ""
    before = set(left())
    words = ("run", "--detach", "shell", "--", "/bin/sh", "-c", "echo begun > begun; exec sleep 900")
    began = time.monotonic()
    started = user.run(*words, cwd=workspace, timeout_s=BOOT_S)
    sys.stdout.write(f"a boot took {time.monotonic() - began:.1f} s\n")
    assert started.returncode == 0, started.stderr
    found = set(left()) - before
    console = user.run("logs", "--console", "last", cwd=workspace).stdout[-2000:]
    assert len(found) == 1, [console, *((one["reason"], one["warnings"]) for one in user.receipts())]
    (cgroup,) = found
    return Living(user, workspace, started.stdout.strip(), Path(cgroup))


@pytest.fixture(scope="module")
def living(image: CarriedImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """One guest, for most tests."""
    living = _begin(image, tmp_path_factory.mktemp("living"), 'memory_max = "256M"\n')
    yield living
    living.user.close()
    assert settled() == []


def test_every_process_of_the_jail_is_in_the_runs_cgroup(living: Living) -> None:
    """Keeper and monitor, with all of the monitor's threads, and nobody else; what has a PID namespace is the jail."""
    found = living.processes()
    jailed = set()
    for folder in Path("/proc").glob("[0-9]*"):
        words = (folder / "status").read_text().split()
        if folder.stat().st_uid == os.getuid() or int(folder.name) in found:
            at = words.index("NSpid:") + 1
            jailed |= {int(folder.name)} if words[at + 1].isdigit() else set()

    assert sorted(found.values()) == ["cloister", "qemu-system-x86"]
    assert living.run in living.cgroup.name
    assert set(found) == jailed
    threads = {int(pid) for pid in (living.cgroup / "cgroup.threads").read_text().split()}
    assert {int(task.name) for task in Path(f"/proc/{living.monitor()}/task").iterdir()} <= threads


def test_the_kernel_has_the_limits_of_the_policy(living: Living) -> None:
    """Read back: the guest's memory and what QEMU needs, no swap, its threads."""
    values = {name: (living.cgroup / name).read_text().strip() for name in
              ("memory.max", "memory.swap.max", "pids.max")}  # fmt: skip

    assert values == {
        "memory.max": str(AROUND), "memory.swap.max": "0", "pids.max": str(TASKS),
    }  # fmt: skip


def test_every_page_of_the_guest_is_counted_from_the_first(living: Living) -> None:
    """A page is charged where its process was when it touched it: the cgroup has all that the monitor ever touched.

    So it was there before its first page: what a monitor touches before it is moved is missing for ever, as the next
    test shows. That holds for a hundred MiB more that the guest takes now, too.
    """
    booted = living.resident()
    charged = living.number("memory.stat", "anon")
    whole = living.number("memory.current")
    words = living.user.command("exec", living.run, "--", "python3", "-c", TOUCH, "100")
    with subprocess.Popen(words, cwd=living.workspace, env=living.user.environment, stdout=subprocess.PIPE) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == b"held\n"
        more, more_charged = living.resident(), living.number("memory.stat", "anon")
        now, peak = living.number("memory.current"), living.number("memory.peak")
        held.terminate()

    sys.stdout.write(
        f"booted {booted >> 20} MiB, charged {charged >> 20}, then {more >> 20} and {more_charged >> 20}\n"
    )
    assert booted > 64 * MIB
    assert charged >= booted - SLACK
    assert more >= booted + 60 * MIB  # the guest had some of it already
    assert more_charged >= more - SLACK
    assert whole >= charged
    assert peak >= now >= more - SLACK


if not BY_SCOPE:  # where we may move processes ourselves

    def test_a_process_that_is_moved_late_is_seen() -> None:
        """The twin of the test before: what was touched outside stays charged there, and the difference shows it."""
        own = Path("/proc/self/cgroup").read_text().strip().partition("::")[2]
        late = Path(f"/sys/fs/cgroup{own}").parent / "late"
        late.mkdir()
        with subprocess.Popen([sys.executable, "-c", TOUCH, "64"], stdout=subprocess.PIPE) as held:
            assert held.stdout is not None
            assert held.stdout.readline() == b"held\n"
            (late / "cgroup.procs").write_text(str(held.pid))
            resident = _field(held.pid, "RssAnon") << 10
            charged = int((late / "memory.stat").read_text().split()[1])
            held.kill()
        late.rmdir()

        assert resident > 64 * MIB
        assert charged < SLACK


def test_a_guest_that_takes_everything_is_not_more(living: Living) -> None:
    """Memory, files in memory, the disk, floods of output: the guest runs into its own ends; the host pays no more."""
    done = living.say(
        "head -c 2G /dev/zero | tail -c 2G >/dev/null; echo memory $?;"
        "head -c 400M /dev/zero >/tmp/big; echo files; rm -f /tmp/big;"
        "head -c 64M /dev/zero >big; sync; echo disk; rm -f big;"
        "head -c 4M /dev/zero | od | tail -n 1; yes | head -c 8M | wc -c"
    )
    alive = living.say("echo alive")

    assert alive.stdout == "alive\n", alive.stderr
    assert "disk" in done.stdout
    assert "memory 0" not in done.stdout
    sys.stdout.write(f"peak {living.number('memory.peak') >> 20} of {AROUND >> 20} MiB\n")
    assert living.number("memory.peak") <= MOST
    assert living.number("memory.events", "oom_kill") == 0


def test_a_balloon_gives_back_and_takes_no_more(living: Living) -> None:
    """Inflated and let go again and again, a balloon never makes the machine larger than it was."""
    monitor = living.ask()
    try:
        for size in (96, 256, 96, 256):
            monitor.call("balloon", value=size * MIB)
            time.sleep(3)
    finally:
        monitor.close()
    living.say("head -c 150M /dev/zero | tail -c 150M | wc -c")

    assert living.say("echo alive").stdout == "alive\n"
    assert living.number("memory.peak") <= MOST


def _busy(living: Living) -> float:
    """Keep the guest's processor busy for a while; return how many of the host's the cgroup used."""
    before, began = living.number("cpu.stat", "usage_usec"), time.monotonic()
    living.say("timeout 8 sh -c 'while :; do :; done'")
    return (living.number("cpu.stat", "usage_usec") - before) / 1e6 / (time.monotonic() - began)


def test_a_monitor_gets_no_more_threads_than_its_share(living: Living) -> None:
    """As many threads as a monitor has use for; one that starts them without end is refused, and ends with its run."""
    monitor = living.ask()
    refused = ""
    try:
        for number in range(40):
            monitor.call("object-add", **{"qom-type": "iothread", "id": f"few{number}"})
        few = living.number("pids.current")
        for number in range(2 * TASKS):
            monitor.call("object-add", **{"qom-type": "iothread", "id": f"many{number}"})
    except qmp.QmpError as error:
        refused = error.message
    finally:
        monitor.close()
    receipt = _receipt(living.user)

    assert few > 40
    assert "gone" in refused
    assert settled() == []
    assert receipt["reason"] == "monitor-died"
    assert any("tasks_max was reached" in words for words in receipt["warnings"]), receipt["warnings"]
    assert f"monitor 448 MiB, {TASKS} tasks: {WAY}" in receipt["limits"]


def _receipt(user: GuestUser) -> dict[str, list[str]]:
    until = time.monotonic() + 60
    while not user.receipts() and time.monotonic() < until:
        time.sleep(0.1)
    found: dict[str, list[str]] = user.receipts()[-1]
    return found


def test_a_monitor_that_takes_more_memory_is_ended(image: CarriedImage, tmp_path: Path) -> None:
    """What it takes beside its guest's has an end: the kernel ends it, never the host's others; and the run says why.

    Without a quota the same guest has all of a processor.
    """
    living = _begin(image, tmp_path, 'memory_max = "256M"\n')
    spent = _busy(living)
    monitor = living.ask()
    wanted = {"qom-type": "memory-backend-ram", "prealloc": True}
    monitor.call("object-add", **wanted, id="some", size=64 * MIB)
    some = living.number("memory.peak")
    try:
        monitor.call("object-add", **wanted, id="more", size=1024 * MIB)
        refused = "nothing"
    except qmp.QmpError as error:
        refused = error.message
    finally:
        monitor.close()
    receipt = _receipt(living.user)
    living.user.close()

    assert spent > 0.8
    assert 64 * MIB < some <= MOST
    assert "gone" in refused
    assert settled() == []
    assert receipt["reason"] == "monitor-died"
    assert any("memory_max was reached" in words for words in receipt["warnings"]), receipt["warnings"]


def test_a_quota_holds_and_nothing_stays_of_a_killed_broker(image: CarriedImage, tmp_path: Path) -> None:
    """A busy processor of the guest gets its share of one of the host's.

    SIGKILL to the broker ends the guest; its cgroup goes at once, or with the next start.
    """
    living = _begin(image, tmp_path, 'cpu_quota = "70%"\n')
    quota = (living.cgroup / "cpu.max").read_text().split()
    spent = _busy(living)
    slowed = living.number("cpu.stat", "nr_throttled")
    members = [*living.processes()]
    os.kill(living.user.broker_pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in members) and time.monotonic() < until:
        time.sleep(0.1)
    gone = [pid for pid in members if Path(f"/proc/{pid}").exists()]
    living.user.inside("true", cwd=living.workspace, timeout_s=BOOT_S)  # the next start closes the record
    receipt = living.user.receipts()[0]
    stays = settled()
    living.user.close()

    assert quota == ["70000", "100000"]
    assert spent < 0.8
    assert slowed > 0
    assert gone == []
    assert receipt["reason"] == "broker-died"
    assert f"cpu_quota 70%: {WAY}, of the monitor" in receipt["limits"]
    assert stays == []
