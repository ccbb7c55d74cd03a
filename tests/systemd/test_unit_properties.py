"""Each property of a unit, tried: what it is there for is refused inside, and is possible in a unit without any.

Properties are asked of systemd as for a run, without the mounts that `cloister-hostd` adds, on the oldest and on the
newest version. `AS_ROOT` attempts are made with root's uid inside, so that it is not the account that is refused.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.isolation import unit
from cloister.plan.unit import SKELETON
from support.machines import Machine

ACCOUNT = "cl-probe-alice"
PROBES = Path(__file__).with_name("unit_probes.py").read_text(encoding="utf-8")
ETC = "/run/cloister/etc/probe"
OUTSIDE = "192.0.2.1:9"
OWN_ADDRESS = "198.51.100.77"
Words = tuple[str, ...]
_SETUP = f"""
    set -e
    id {ACCOUNT} 2>/dev/null || useradd --uid 1900000777 -U -M -s /usr/sbin/nologin {ACCOUNT}
    for name in usr etc proc sys dev run tmp home root var/tmp .cloister; do mkdir -p {SKELETON}/$name; done
    for name in bin sbin lib lib64; do [ -L {SKELETON}/$name ] || ln -s usr/$name {SKELETON}/$name; done
    mkdir -p {ETC} && cp -r /etc/passwd /etc/group /etc/ld.so.cache /etc/ssl /etc/alternatives {ETC}
    touch /tmp/of-the-host /dev/shm/of-the-host && chmod 666 /tmp/of-the-host /dev/shm/of-the-host
    mkdir -p /usr/local/lib/of-alice && chown alice /usr/local/lib/of-alice
"""

# Attempt, arguments → refused as the account.
REFUSED: dict[str, Words] = {
    "files in /tmp (PrivateTmp)": ("read", "/tmp/of-the-host"),
    "shared memory (TemporaryFileSystem)": ("read", "/dev/shm/of-the-host"),
    "homes (ProtectHome, RootDirectory)": ("read", "/home"),
    "the host's /var (RootDirectory)": ("read", "/var/lib/dpkg"),
    "the host's journal (BindLogSockets)": ("connect", "/run/systemd/journal/socket"),
    "hardware and control groups (InaccessiblePaths)": ("read", "/sys"),
    "the host's large pages (InaccessiblePaths)": ("read", "/dev/hugepages"),
    "the bus (RootDirectory)": ("connect", "/run/dbus/system_bus_socket"),
    "owners of files (PrivateUsers)": ("owner", "/usr/local/lib/of-alice"),
    "user namespaces (RestrictNamespaces)": ("user_namespace",),
    "clone3 (RestrictNamespaces)": ("clone3",),
    "set-uid files (RestrictSUIDSGID)": ("set_uid_bit",),
    "execution domains (LockPersonality)": ("personality",),
    "keys (SystemCallFilter)": ("keyring",),
    "io_uring (SystemCallFilter)": ("io_uring",),
    "user faults (SystemCallFilter)": ("userfaultfd",),
    "names of files by handle (SystemCallFilter)": ("handle_of", "/usr"),
    "memory of other processes (SystemCallFilter)": ("other_memory",),
    "file handles (SystemCallFilter)": ("handles",),
    "tracing (SystemCallFilter)": ("tracing",),
    "the clock (SystemCallFilter, ProtectClock)": ("clock",),
    "system calls of 32 bits (SystemCallArchitectures)": ("foreign_calls",),
    "virtual machines' sockets (RestrictAddressFamilies)": ("family", "40"),
    "core files (LimitCORE)": ("core_file",),
    "files that others can read (UMask)": ("world_readable",),
    "capabilities (CapabilityBoundingSet, NoNewPrivileges)": ("capabilities",),
}
# The same with root's uid inside: what an account may never do anyway.
AS_ROOT: dict[str, Words] = {
    "writing programs (ProtectSystem)": ("write", "/usr/bin"),
    "writing settings (ProtectSystem)": ("write", "/etc"),
    "kernel settings (ProtectKernelTunables)": ("write", "/proc/irq/default_smp_affinity"),
    "the kernel's log (ProtectKernelLogs)": ("kernel_log",),
    "modules (ProtectKernelModules)": ("modules",),
    "the host's name (ProtectHostname)": ("hostname",),
    "mounts (SystemCallFilter)": ("mounting",),
    "mount namespaces (RestrictNamespaces)": ("mount_namespace",),
    "BPF (SystemCallFilter)": ("bpf",),
    "performance events (SystemCallFilter)": ("perf",),
    "realtime (RestrictRealtime)": ("realtime",),
    "raw frames (RestrictAddressFamilies)": ("packet",),
    "swap (SystemCallFilter)": ("swap",),
    "ports of the processor (SystemCallFilter)": ("ports",),
    "control groups (InaccessiblePaths, ProtectControlGroups)": ("control_group",),
    "the manager (RootDirectory)": ("connect", "/run/systemd/private"),
}
WORKS = {
    "Python": ("python",),
    "git": ("git",),
    "code made at run time, as by V8 and Bun": ("write_execute",),
    "the list of interfaces": ("interfaces",),
    "shared memory of its own": ("write", "/dev/shm"),
    "its own /tmp": ("write", "/tmp"),  # the unit's own
    "/dev/null": ("write", "/dev/null"),
    "random numbers": ("read", "/dev/urandom"),
    "certificates": ("read", "/etc/ssl/certs"),
    "its own processes": ("read", "/proc/self/status"),
}


class Units:
    """Starts attempts in units of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.run(["sh", "-c", _SETUP])
        self._answers: dict[tuple[object, ...], str] = {}

    def box(self, **choices: Any) -> unit.UnitBox:
        """Return what a run of the account has."""
        return unit.UnitBox(
            systemd=self.machine.version, account=ACCOUNT, shim="/usr/bin/true", etc_directory=ETC, merged_usr=True,
            **choices,
        )  # fmt: skip

    def properties(self, *without: str, **choices: Any) -> list[tuple[str, str]]:
        """Return a run's properties but for those named."""
        return [(name, value) for name, value in unit.properties(self.box(**choices)) if name not in without]

    def attempts(self, properties: list[tuple[str, str]], wanted: Iterable[Words]) -> dict[Words, str]:
        """Make attempts in one unit, and return their answers."""
        listed = list(wanted)
        flags = [word for name, value in properties for word in ("-p", f"{name}={value}")]
        done = self.machine.run(
            ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *flags, "--", "/usr/bin/python3", "-c", PROBES,
             json.dumps(listed)], check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(zip(listed, json.loads(done.stdout), strict=True))

    def attempt(self, properties: list[tuple[str, str]], *words: str) -> str:
        """Make one attempt in a unit of its own."""
        return self.attempts(properties, [words])[words]

    @functools.cached_property
    def inside(self) -> dict[Words, str]:
        """What came of all attempts in a unit as a run has it."""
        return self.attempts(self.properties(), [*REFUSED.values(), *WORKS.values()])

    @functools.cached_property
    def bare(self) -> dict[Words, str]:
        """What came of them in a unit that has nothing but the account."""
        return self.attempts([("User", ACCOUNT)], REFUSED.values())

    @functools.cached_property
    def inside_as_root(self) -> dict[Words, str]:
        """What came of attempts with root's uid in a unit as a run has it."""
        return self.attempts(self.properties("User", "Group"), AS_ROOT.values())

    @functools.cached_property
    def bare_as_root(self) -> dict[Words, str]:
        """What came of them in a unit without any property."""
        return self.attempts([], AS_ROOT.values())


@pytest.fixture(scope="session")
def units(machine: Machine) -> Iterator[Units]:
    """Units of an account of this file's own."""
    yield Units(machine)
    machine.run(["sh", "-c", "rm -rf /tmp/of-the-host /dev/shm/of-the-host /usr/local/lib/of-alice"])


@pytest.fixture(scope="session")
def listener(machine: Machine) -> Iterator[str]:
    """A server of the host, on all its addresses; yields where, with a port."""
    code = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True)\n"
    code += "while s.accept(): pass"
    server = machine.popen(["python3", "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    yield f"127.0.0.1:{server.stdout.readline().strip()}"
    server.kill()
    server.wait()


@pytest.mark.parametrize("words", REFUSED.values(), ids=list(REFUSED))
def test_what_a_property_is_there_for_is_refused(units: Units, words: Words) -> None:
    """Refused in the unit of a run, possible for the same account in a unit without its properties."""
    assert units.bare[words] == "allowed"
    assert units.inside[words] != "allowed"


@pytest.mark.parametrize("words", AS_ROOT.values(), ids=list(AS_ROOT))
def test_not_even_roots_uid_would_help(units: Units, words: Words) -> None:
    """Refused with root's uid inside, by the property and not by ownership; possible for root without it."""
    assert units.bare_as_root[words] == "allowed"
    assert units.inside_as_root[words] != "allowed"


@pytest.mark.parametrize("words", WORKS.values(), ids=list(WORKS))
def test_what_agents_need_works(units: Units, words: Words) -> None:
    """OF7: the positive twin of all of the above: a check that cannot fail proves nothing."""
    assert units.inside[words] == "allowed"


def test_write_execute_false_refuses_code_made_at_run_time(units: Units) -> None:
    """Neither at once nor one after the other; Python itself and git still work."""
    answers = units.attempts(
        units.properties(write_execute=False), [("write_execute",), ("execute_later",), ("python",), ("git",)]
    )

    assert [answer == "allowed" for answer in answers.values()] == [False, False, True, True], answers


def test_netlink_false_refuses_its_sockets(units: Units) -> None:
    """The list of interfaces is not to be had then; internet and Unix sockets are."""
    answers = units.attempts(units.properties(netlink=False), [("interfaces",), ("family", "2"), ("family", "1")])

    assert [answer == "allowed" for answer in answers.values()] == [False, True, True], answers


def test_a_nested_sandbox_can_be_built_where_the_policy_says_so(units: Units) -> None:
    """Bubblewrap works inside with `nested`, and not without; what is not about sandboxes is refused as before."""
    inside = [("own_sandbox", "bound"), ("user_namespace",), ("io_uring",), ("keyring",), ("tcp", OUTSIDE)]
    answers = units.attempts(units.properties(nested=True), inside)

    assert [answer == "allowed" for answer in answers.values()] == [True, True, False, False, False], answers
    assert units.attempt(units.properties(), "own_sandbox", "bound") != "allowed"


def test_a_nested_sandbox_gets_a_proc_of_its_own(units: Units) -> None:
    """Nothing in /proc is covered by the properties of `nested`, so the kernel gives a new one.

    The machine of the tests itself has a read-only /proc/sys; systemd 254, not 252, brings it along into every unit.
    """
    covered = units.machine.version >= 254
    assert (units.attempt(units.properties(nested=True), "own_sandbox", "proc") == "allowed") is not covered


def test_no_address_is_reached(units: Units, listener: str) -> None:
    """Not even the host's own loopback: the unit's is another one. A unit without the properties reaches it."""
    assert units.attempt([("User", ACCOUNT)], "tcp", listener) == "allowed"
    assert units.attempt(units.properties(), "tcp", listener) != "allowed"


def test_addresses_are_denied_a_third_time(units: Units, listener: str) -> None:
    """Were the network namespace lost, IPAddressDeny= would let nothing but loopback pass; without it all passes."""
    outside = listener.replace("127.0.0.1", OWN_ADDRESS)
    units.machine.run(["sh", "-c", f"ip link set lo up; ip addr add {OWN_ADDRESS}/32 dev lo 2>/dev/null || true"])

    assert units.attempt(units.properties("PrivateNetwork"), "tcp", outside) != "allowed"
    assert units.attempt(units.properties("PrivateNetwork", "IPAddressDeny"), "tcp", outside) == "allowed"


def test_shared_memory_of_others_is_not_found(units: Units) -> None:
    """A System V segment made outside is found without PrivateIPC=, and not with it."""
    code = "import ctypes; print(ctypes.CDLL(None).shmget(77, 4096, 0o1666))"
    units.machine.run(["python3", "-c", code])

    assert units.attempt([("User", ACCOUNT)], "shared_memory", "77") == "allowed"
    assert units.attempt(units.properties(), "shared_memory", "77") != "allowed"


def test_processes_of_others_are_not_seen(units: Units) -> None:
    """Another user's is invisible, and so is the host's PID 1; from 257 on PID 1 is the unit's own first process."""
    other = units.machine.popen(["sleep", "60"], user="alice")
    try:
        units.machine.wait_for("pgrep -u alice -x sleep")
        number = units.machine.run(["pgrep", "-u", "alice", "-x", "sleep"]).stdout.split()[0]

        assert units.attempt([("User", ACCOUNT)], "process", number) == "allowed"
        assert units.attempt(units.properties(), "process", number) != "allowed"
        first = units.attempt(units.properties(), "process", "1")
        assert (first == "allowed") is (units.machine.version >= 257)
    finally:
        other.kill()
        other.wait()


def test_limits_are_kept_where_the_controllers_are(units: Units) -> None:
    """Memory and tasks: less than the limit works, more does not. systemd takes limits without a word in any case."""
    limits = unit.UnitLimits(memory_bytes=96 << 20, tasks=40, open_files=64, oom="continue")
    wanted: list[Words] = [("memory", str(32 << 20)), ("tasks", "10"), ("memory", str(200 << 20)), ("tasks", "60")]
    answers = units.attempts(units.properties(limits=limits), wanted)

    assert answers[wanted[0]] == answers[wanted[1]] == "allowed"
    for words, controller in ((wanted[2], "memory"), (wanted[3], "pids")):
        assert (answers[words] != "allowed") is (controller in units.machine.controllers), answers
    assert units.machine.controllers >= {"memory", "pids"} or not units.machine.hybrid


def test_a_unit_ends_when_its_time_is_over(units: Units) -> None:
    """RuntimeMaxSec= ends what the broker did not end."""
    properties = units.properties(limits=unit.UnitLimits(runtime_s=1))
    flags = [word for name, value in properties for word in ("-p", f"{name}={value}")]
    done = units.machine.run(
        ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *flags, "--", "/usr/bin/sleep", "30"],
        check=False, timeout=20,
    )  # fmt: skip

    assert done.returncode != 0


@pytest.mark.parametrize(("internet", "most"), [(False, 0.5), (True, 1.1)])
def test_systemd_itself_finds_little_exposed(units: Units, internet: bool, most: float) -> None:
    """`systemd-analyze security`: 0.5 by default, 1.1 in mode `internet`; a bare service has more than 8."""
    scores = []
    for lines in ([f"{name}={value}" for name, value in units.properties(internet=internet)], ["User=alice"]):
        text = "\n".join(["[Service]", "ExecStart=/bin/true", *lines, ""])
        units.machine.write("/run/scored/cloister-scored.service", text)
        path = "/run/scored/cloister-scored.service"
        told = units.machine.run(["systemd-analyze", "security", "--offline=true", "--no-pager", path], check=False)
        scores.append(float(told.stdout.strip().splitlines()[-1].split(":")[1].split()[0]))

    assert scores[0] <= most
    assert scores[1] > 8
