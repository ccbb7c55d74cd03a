"""The machines themselves: what those who test with them may rely on. Settings may be dropped silently; denials not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import machines
from support.machine_boot import WITHHELD
from support.machines import Machine, MachineError

Make = Callable[..., Machine]


def test_it_boots_into_a_running_system(machine: Machine) -> None:
    """PID 1 is the suite's systemd, no unit has failed, and people have their user managers."""
    versions = {"bookworm": 252, "bookworm-backports": 254, "trixie": 257}  # what is in the making moves on
    assert machine.version == versions.get(machine.suite, machine.version) >= 252
    state = machine.run(["systemctl", "is-system-running"], check=False).stdout
    assert state == "running\n", machine.run(["systemctl", "--failed", "--no-legend"]).stdout
    told = machine.run(["systemctl", "--user", "is-system-running", "--wait"], user="alice")
    assert told.stdout == "running\n"


def test_cloister_is_installed_for_everybody_and_is_roots(machine: Machine) -> None:
    """Alice can call it, and nothing on the way to it is anybody's but root's."""
    assert "cloister" in machine.run(["cloister", "--version"], user="alice").stdout
    assert machine.python("import cloister, support, os; print(os.getuid())", user="alice").stdout == "1000\n"
    path = Path("/opt/cloister/bin/cloister")
    for folder in [path, *path.parents]:
        told = machine.path(str(folder)).stat()
        assert told.st_uid == 0
        assert not told.st_mode & 0o022


def test_a_command_has_its_users_rights_and_environment_and_no_more(machine: Machine) -> None:
    """Uid, groups, home and variables are those of a login; nothing of this process comes along."""
    told = machine.run(["sh", "-c", "id -un; id -Gn; pwd; env | cut -d= -f1 | sort | tr '\\n' ' '"], user="alice")
    user, groups, where, names = told.stdout.splitlines()
    assert (user, groups, where) == ("alice", "alice", "/home/alice")
    assert names.split() == sorted(
        ["HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "TERM", "XDG_RUNTIME_DIR", "PWD"]
    )
    with pytest.raises(MachineError, match="Permission denied"):
        machine.run(["cat", "/etc/shadow"], user="alice")
    machine.write("/home/alice/a/secret", "x", 0o600, owner="alice")
    assert machine.run(["cat", "/home/alice/a/secret"], user="alice").stdout == "x"
    assert machine.run(["cat", "/home/alice/a/secret"], user="bob", check=False).returncode == 1


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9)])
def test_statuses_come_through(machine: Machine, script: str, status: int) -> None:
    """Exit codes and signals of a command inside are those of the process that stands for it outside."""
    assert machine.run(["sh", "-c", script], check=False).returncode == status


def test_a_command_ends_with_the_process_that_stands_for_it(machine: Machine) -> None:
    """Killing what `popen` returned, and a timeout of `run`, end what runs inside."""
    process = machine.popen(["sleep", "7654"])
    inner = machine.inner(process)
    assert "7654" in Path(f"/proc/{inner}/cmdline").read_text(encoding="utf-8")
    process.kill()
    process.wait()
    with pytest.raises(subprocess.TimeoutExpired):
        machine.run(["sleep", "7655"], timeout=0.2)
    machine.wait_for("! pgrep -f 'sleep 765[45]'")


# ---- what a unit's properties really do here ----

AS_ALICE = "os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)"
OPEN_FILE = "open({!r}, 'w').close()"
CONNECT = "import socket; s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', int(sys.argv[1])))"
DENIALS = {
    # Property: code that it must stop, and that works without it.
    "ProtectSystem=strict": OPEN_FILE.format("/usr/local/written"),
    "ProtectHome=yes": "os.listdir('/home/alice')",
    "PrivateTmp=yes": "os.stat('/tmp/shared-by-all')",
    "PrivateDevices=yes": "os.open('/dev/net/tun', os.O_RDWR)",
    "PrivateNetwork=yes": CONNECT,
    "IPAddressDeny=any": CONNECT,
    "RestrictAddressFamilies=AF_UNIX": CONNECT,
    "SystemCallFilter=~@mount": "libc.umount2(b'/nowhere', 0); assert ctypes.get_errno() == 2",
    "RestrictNamespaces=yes": "assert libc.unshare(0x10000000) == 0",
    "CapabilityBoundingSet=": "os.chown('/tmp/shared-by-all', 1234, 1234)",
    "MemoryDenyWriteExecute=yes": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "NoNewPrivileges=yes": "assert 'NoNewPrivs:\\t0' in open('/proc/self/status').read()",
    "ProtectKernelTunables=yes": OPEN_FILE.format("/proc/sys/net/ipv4/ip_default_ttl"),
    "ProtectProc=invisible": f"{AS_ALICE}; os.stat('/proc/1/cmdline')",
    "InaccessiblePaths=/home/alice": "assert os.listdir('/home/alice')",
}


@pytest.fixture(scope="module")
def listener(machine: Machine) -> str:
    """Return a port of the machine's loopback that answers, and make the file that all see in /tmp."""
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); s.accept()"
    )
    process = machine.popen([machines.PYTHON, "-c", code.replace("s.accept()", "\nwhile True: s.accept()")], stdout=-1)
    port = process.stdout.readline().decode().strip()
    machine.write("/tmp/shared-by-all", "")
    yield port
    process.kill()
    process.wait()


def unit(machine: Machine, properties: list[str], code: str, *argv: str) -> int:
    """Run Python code as root in a unit with these properties, and return its status."""
    program = f"import os, sys, ctypes; libc = ctypes.CDLL(None, use_errno=True)\n{code}"
    options = [option for text in properties for option in ("-p", text)]
    run = [
        "systemd-run",
        "--quiet",
        "--wait",
        "--pipe",
        "--collect",
        *options,
        "/usr/bin/python3",
        "-c",
        program,
        *argv,
    ]
    return machine.run(run, check=False, timeout=20).returncode


@pytest.mark.parametrize("setting", DENIALS)
def test_a_property_is_in_force(machine: Machine, listener: str, setting: str) -> None:
    """What the property forbids fails with it, and works without it."""
    properties = [setting, *(["SystemCallErrorNumber=EPERM"] if "Filter" in setting else [])]
    assert unit(machine, [], DENIALS[setting], listener) == 0
    assert unit(machine, properties, DENIALS[setting], listener) != 0


LIMITS = {
    "MemoryMax=24M": ("memory", "x = bytearray(64 << 20)"),
    "TasksMax=8": (
        "pids",
        "import threading, time\nfor _ in range(16): threading.Thread(target=time.sleep, args=(.1,)).start()",
    ),
}


@pytest.mark.parametrize("setting", LIMITS)
def test_a_limit_is_in_force_where_its_controller_is(machine: Machine, setting: str) -> None:
    """With the controller the limit bites; `controllers` does not promise what is not there."""
    controller, code = LIMITS[setting]
    assert unit(machine, [], code) == 0
    limited = unit(machine, [setting, "MemorySwapMax=0"], code)
    assert (limited != 0) == (controller in machine.controllers)


def test_limits_are_real_on_one_machine_at_least(machine: Machine) -> None:
    """Debian 12 sees the controllers of this host, whichever version of cgroups they are bound to."""
    if machine.suite == "bookworm":
        assert {"memory", "pids", "cpu"} <= machine.controllers


def test_a_filter_by_uid_is_in_force(machine: Machine, listener: str) -> None:
    """The rules of nftables are the machine's own, and `meta skuid` refuses one user without touching another."""
    rules = (
        "table inet probe { chain o { type filter hook output priority 0; meta skuid bob reject with tcp reset; }; }"
    )
    knock = [machines.PYTHON, "-c", f"import sys; {CONNECT}", listener]
    try:
        machine.run(["nft", "-f", "-"], input=rules)
        assert machine.run(knock, user="alice", check=False).returncode == 0
        assert machine.run(knock, user="bob", check=False).returncode == 1
    finally:
        machine.run(["nft", "delete", "table", "inet", "probe"])
    assert machine.run(knock, user="bob", check=False).returncode == 0
    here = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert "probe" not in here


def test_bubblewrap_works_inside(machine: Machine) -> None:
    """A user's own sandbox, with a /proc of its own: what the other backend needs."""
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "--proc", "/proc", "--dev", "/dev", "true"]
    assert machine.run(command, user="alice").returncode == 0


def test_homes_can_be_idmapped_and_lie_under_an_overlay(machine: Machine) -> None:
    """/home, /var, /srv and /root are file systems of their own kind, not part of the overlay."""
    for folder in ("/home", "/var", "/srv", "/root", "/home/alice"):
        assert machine.run(["stat", "-f", "-c", "%T", folder]).stdout == "tmpfs\n"
    assert machine.run(["stat", "-f", "-c", "%T", "/etc"]).stdout == "overlayfs\n"


@pytest.mark.parametrize("path", ["/proc/sys/kernel/core_pattern", "/sys/kernel/uevent_seqnum"])
def test_this_hosts_kernel_is_out_of_reach(machine: Machine, path: str) -> None:
    """The machine's root opens none of the host's switches, where it would look for them."""
    done = machine.run(["python3", "-c", f"open({path!r}, 'r+')"], check=False)
    assert "Read-only file system" in done.stderr


@pytest.mark.parametrize("who", ["a visitor", "PID 1", "a unit"])
def test_nobody_inside_has_powers_that_no_namespace_confines(machine: Machine, who: str) -> None:
    """Clock, modules, ports and device files of the host are nobody's. Looked at, not tried: the host would feel it."""
    look = ["cat", "/proc/1/status" if who == "PID 1" else "/proc/self/status"]
    start = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect"] if who == "a unit" else []
    status = dict(line.split(":\t", 1) for line in machine.run([*start, *look]).stdout.splitlines() if ":\t" in line)
    for field in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"):
        held = [name for name, number in WITHHELD.items() if int(status[field], 16) >> number & 1]
        assert not held, field
    assert int(status["CapEff"], 16) >> 21 & 1, "it is root all the same: CAP_SYS_ADMIN"


# ---- the power switch ----


def test_a_reboot_keeps_files_and_ends_processes(fresh_machine: Make) -> None:
    """After an orderly reboot files of all file systems are there, /run is empty, and nothing runs on."""
    machine = fresh_machine()
    before = machine.pid
    for path in ("/etc/kept", "/var/lib/kept", "/home/alice/kept", "/run/lost", "/tmp/lost"):
        machine.write(path, "text")
    machine.run(["systemd-run", "--unit=sleeper", "sleep", "7656"])
    identity = machine.read("/etc/machine-id")
    machine.reboot()

    assert machine.pid != before
    assert machine.read("/etc/machine-id") == identity
    there = [
        p
        for p in ("/etc/kept", "/var/lib/kept", "/home/alice/kept", "/run/lost", "/tmp/lost")
        if machine.path(p).exists()
    ]
    assert there == ["/etc/kept", "/var/lib/kept", "/home/alice/kept"]
    assert machine.run(["pgrep", "-f", "sleep 7656"], check=False).returncode == 1
    assert machine.run(["systemctl", "is-system-running"], check=False).stdout == "running\n"


def test_a_power_cut_asks_nobody(fresh_machine: Make) -> None:
    """A unit that would write at its stop does not get to, files written before are there, and it boots again."""
    machine = fresh_machine()
    machine.run(["systemd-run", "--unit=writer", "-p", "ExecStop=touch /var/stopped", "sleep", "7657"])
    machine.write("/var/kept", "text")
    machine.cut()
    assert machine.path("/var/kept").exists()
    assert not machine.path("/var/stopped").exists()
    machine.run(["systemd-run", "--unit=writer", "-p", "ExecStop=touch /var/stopped", "sleep", "7657"])
    machine.reboot()
    assert machine.path("/var/stopped").exists()


# ---- nothing is left ----


def test_nothing_is_left_of_a_machine(fresh_machine: Make) -> None:
    """No process, no mount and no cgroup stays behind when it is closed."""
    machine = fresh_machine()
    machine.run(["systemd-run", "--unit=sleeper", "sleep", "7658"])
    namespace = os.readlink(f"/proc/{machine.pid}/ns/pid")
    files = [Path(file).parents[1] for file in machine._files]
    assert all(file.exists() for file in files)
    machine.close()
    assert not any(file.name.startswith("cloister-test-") and file.exists() for file in files)
    assert not _in_namespace(namespace)
    assert "cloister-test" not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def test_a_machine_ends_with_the_tests_however_they_end(suite: str, fresh_machine: Make, tmp_path: Path) -> None:
    """SIGKILL for pytest ends its machines; SIGKILL for the program between them too, and the next one cleans up."""
    machine = fresh_machine()
    lower = machine._boot.args[-1]
    program = [sys.executable, "-I", Path(machines.__file__).with_name("machine_boot.py"), lower]
    for victim in ("tests", "program"):
        store = tmp_path / victim
        store.mkdir()
        program[-1] = lower.replace(str(machine._log.parent / "store"), str(store))
        other = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        said = []
        while not said or not said[-1].startswith("ready"):
            said.append(other.stdout.readline().decode())
        namespace = os.readlink(f"/proc/{said[-1].split()[1]}/ns/pid")
        assert _in_namespace(namespace)
        if victim == "tests":
            other.stdin.close()
        else:
            other.send_signal(signal.SIGKILL)
        other.wait(20)
        other.stdout.close()
        until = time.monotonic() + 10
        while _in_namespace(namespace) and time.monotonic() < until:
            time.sleep(0.02)
        assert not _in_namespace(namespace)
        made = [Path(line.split()[1]).parent for line in said if line.startswith("cgroup") and "visitors" in line]
        # Where the program was killed they stay, until any machine starts, here or in another run of these tests.
        assert victim == "program" or not [folder for folder in made if folder.exists()]
    fresh_machine().close()
    assert not [folder for folder in made if folder.exists()]


def _in_namespace(namespace: str) -> list[str]:
    """Return the processes in a PID namespace."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.readlink(folder / "ns/pid") == namespace:
                    found.append(folder.name)
            except OSError:
                continue
    return found
