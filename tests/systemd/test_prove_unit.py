"""The battery against agents that are units of the system, as their user types it; and against weak units."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from runs_rig import POLICY, POLICY_FILE, Rig

from cloister.prove.case import load
from support.machines import PYTHON, TESTS, Machine

CASES = load()
UNIT = {name for name, case in CASES.items() if "unit" in case.if_policy}
OF_POLICY = {name for name, case in CASES.items() if case.if_policy} - UNIT
"""They need credentials, models and the like in the policy."""
LIMITS = {"limits-memory", "limits-disk", "limits-tasks"}
"""They need limits in the policy; tried below."""
LIMITED = """
[agents.limited]
isolation = "unit"
command = ["/bin/sh"]
limits = { memory_max = "512M", tasks_max = 64, disk_max = "16M" }

[agents.armed]
isolation = "unit"
command = ["/bin/sh"]
egress = { allow = ["bound.example:443"] }

[agents.armed.credentials.api]
secret = "file:/etc/cloister/secrets/api"
env = "API_KEY"
inject = { scheme = "bearer", host = "bound.example" }
"""
SECRET = "made-up-9f2c7d1e5b8a4f60"
ARMED = ("cred-authority-key", "cred-certificates", "cred-elsewhere", "cred-placeholders", "fs-secret-stores",
         "proc-environment", "unit-accounts", "unit-daemons")  # fmt: skip
HAUL = "cat /proc/*/environ /proc/*/cmdline; find /etc /run /tmp /home /dev/shm /var /opt -type f -exec cat {} +; env"
"""Everything that an agent can read and that could hold a secret."""

# What is left out, and the case that finds it out: denied with all properties, allowed without these.
FOUND_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("User", "Group"), "unit-accounts"),
    (("RootDirectory",), "fs-home-canary"),
    (("RootDirectory",), "ipc-unix-socket"),
    (("ProtectHome",), "fs-other-homes"),
    (("TemporaryFileSystem",), "ipc-posix"),
    (("InaccessiblePaths",), "unit-properties"),
    (("PrivateDevices",), "fs-devices"),
    (("PrivateIPC",), "ipc-system-v"),
    (("PrivateNetwork",), "unit-properties"),
    (("PrivateUsers",), "unit-properties"),
    (("ProtectProc", "PrivatePIDs"), "proc-host-pids"),
    (("CapabilityBoundingSet",), "unit-properties"),
    (("NoNewPrivileges",), "unit-properties"),
    (("NoNewPrivileges",), "fs-setuid-programs"),
    (("RestrictNamespaces",), "kernel-userns-unshare"),
    (("RestrictNamespaces",), "kernel-userns-clone3"),
    (("LockPersonality",), "kernel-personality"),
    (("SystemCallFilter",), "kernel-io-uring"),
    (("SystemCallFilter",), "kernel-ptrace"),
    (("LimitCORE",), "proc-core-dumps"),
)
LISTENER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while server.accept():
    pass
"""
AS_ACCOUNT = """
import json, os, socket, sys
uid = int(sys.argv[1])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return type(error).__name__
    return "ALLOWED"
def unix(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(bytes([13, 0, 0, 0]) + b"L" + bytes([1, 0, 0, 0, 5, 0, 0, 0]) + b"verb=")
        if not (answer := client.recv(64)) or answer[4:5] == b"F":
            raise PermissionError(13, "refused in words")
def tcp(host, port):
    socket.create_connection((host, port), 2).close()
print(json.dumps({
    "hostd": refused(unix, "/run/cloister/hostd.sock"),
    "proxyd": refused(unix, "/run/cloister/proxyd.sock"),
    "records": refused(os.listdir, "/var/lib/cloister/proxy"),
    "boxes": refused(os.listdir, "/run/cloister/proxy/runs"),
    "plans": refused(os.listdir, "/var/lib/cloister/hostd"),
    "home": refused(os.listdir, "/root"),
    "loopback": refused(tcp, "127.0.0.1", int(sys.argv[2])),
}))
"""
"""Takes a uid and a port of the host's loopback, and says of each door whether it opens."""
SECOND_LAYER = "net-direct-tcp"
"""Without PrivateNetwork= the packet filter of accounts refuses the same."""


@pytest.fixture(scope="module")
def rig(suite: str, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One installed machine for the tests of this file, on Debian 12 and 13."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"prove-{suite}")) as machine:
        made = Rig(machine)
        machine.write("/etc/cloister/secrets/api", SECRET, mode=0o600)
        policy = POLICY.replace('"box"]', '"box", "limited", "armed"]').replace(
            "[users.alice]", f"{LIMITED}\n[users.alice]"
        )
        machine.write(POLICY_FILE, policy)
        machine.run(["cloister", "apply", "--yes"], timeout=120)
        yield made


def prove(rig: Rig, *words: str, agent: str = "sh", user: str = "alice") -> dict[str, dict[str, Any]]:
    """Attack an agent as its user would; return what came of each case, by id."""
    cwd = rig.project.replace("alice", user)
    done = rig.cloister("prove", agent, "--json", *words, user=user, cwd=cwd, timeout=150)
    assert done.returncode in (0, 1, 69), done.stderr
    assert done.stdout, done.stderr
    return {case["id"]: case for case in json.loads(done.stdout)["cases"]}


@pytest.fixture(scope="module")
def battery(rig: Rig) -> dict[str, dict[str, Any]]:
    """Run the whole battery once for each machine; alice's home is as before."""
    before = rig.machine.run(["find", "/home/alice", "/tmp", "/var/tmp", "/dev/shm", "-newer", "/etc/hostname"]).stdout
    found = prove(rig)
    rig.clean()
    after = rig.machine.run(["find", "/home/alice", "/tmp", "/var/tmp", "/dev/shm", "-newer", "/etc/hostname"]).stdout
    new = set(after.splitlines()) - set(before.splitlines())
    assert not {path for path in new if "canary" in path or "/.cloister/" in path or "prove-" in path}
    return found


@pytest.mark.parametrize("case", sorted(set(CASES) - LIMITS - OF_POLICY))
def test_an_attack_on_a_unit_is_denied(case: str, battery: dict[str, dict[str, Any]]) -> None:
    """The attack fails, nothing on the host was touched, and what must work works."""
    result = battery[case]
    expected = "warned" if CASES[case].warned_of else "denied"

    assert result["outcome"] == expected, f"{result['detail']}\nexpected: {CASES[case].expect}"
    assert result["twin"] in ("ok", "none")


def test_what_the_policy_does_not_have_is_told(battery: dict[str, dict[str, Any]]) -> None:
    """Cases for secrets and models are counted and left out; limits that are not set are opted out by name."""
    assert {battery[case]["outcome"] for case in OF_POLICY} == {"not-in-policy"}
    assert {battery[case]["outcome"] for case in LIMITS} == {"opted-out"}


def test_limits_of_a_unit_hold(rig: Rig) -> None:
    """Memory, disk and processes cannot be used up, where the machine has the controllers."""
    controllers = rig.machine.controllers
    needed = {"limits-memory": "memory", "limits-tasks": "pids", "limits-disk": ""}
    names = sorted(case for case, controller in needed.items() if not controller or controller in controllers)
    found = prove(rig, *(word for name in names for word in ("--case", name)), agent="limited")

    assert {name: found[name]["outcome"] for name in names} == dict.fromkeys(names, "denied"), found


def test_secrets_of_the_system_are_never_inside(rig: Rig) -> None:
    """An agent with a credential of the system's has a placeholder; nobody but root and the broker sees the value."""
    found = prove(rig, *(word for name in (*ARMED, "cred-records") for word in ("--case", name)), agent="armed")
    hauled = rig.sh(HAUL, agent="armed", timeout=120, text=False).stdout
    kept = rig.machine.run(["grep", "-rl", SECRET, "/home/alice", "/run/user", "/var/lib/cloister", "/run/cloister"],
                           check=False)  # fmt: skip

    assert {name: found[name]["outcome"] for name in ARMED} == dict.fromkeys(ARMED, "denied"), found
    assert found["cred-records"]["outcome"] == "cannot-run"  # a person cannot read it, so cannot look for it
    assert b"API_KEY=" in hauled
    assert SECRET.encode() not in hauled
    assert SECRET not in json.dumps(found)
    assert kept.stdout == ""


def test_another_user_sees_the_same(rig: Rig) -> None:
    """Bob's account, projects and daemon are attacked by bob, with the same end."""
    found = prove(rig, *(word for name in sorted(UNIT) for word in ("--case", name)), user="bob")

    assert {name: result["outcome"] for name, result in found.items()} == dict.fromkeys(UNIT, "denied"), found


def test_the_second_layer_holds_the_account_without_its_unit(rig: Rig) -> None:
    """With the account's uid, outside of any unit: no hostd, no broker, no state of others, no packet."""
    assert rig.sh("true").returncode == 0  # the daemons' directories are there
    listener = rig.machine.popen(["python3", "-c", LISTENER], stdout=subprocess.PIPE, text=True)
    assert listener.stdout
    try:
        port = listener.stdout.readline().strip()
        account, alice = (rig.machine.run(["id", "-u", name]).stdout.strip() for name in ("cl-sh-alice", "alice"))
        told, twin = (
            json.loads(rig.machine.run(["python3", "-c", AS_ACCOUNT, uid, port]).stdout) for uid in (account, alice)
        )
    finally:
        listener.kill()
        listener.wait()

    assert told.pop("loopback") == "ConnectionRefusedError"
    assert twin["loopback"] == "ALLOWED"
    assert set(told.values()) == {"PermissionError"}, told


def test_a_ladder_of_a_unit_is_refused(rig: Rig) -> None:
    """`--ladder` compares from within namespaces of its own, where no unit can be: it says so."""
    done = rig.cloister("prove", "sh", "--ladder")

    assert (done.returncode, "ladder-unit" in done.stderr) == (69, True), done.stderr


@pytest.fixture(scope="module")
def weak(rig: Rig) -> dict[tuple[str, ...], dict[str, str]]:
    """Run the battery's cases once for each weakness; return outcomes by what was left out, nothing of it first."""
    attempts: dict[tuple[str, ...], set[str]] = {(): {case for _, case in FOUND_OUT} | {SECOND_LAYER}}
    for without, case in FOUND_OUT:
        attempts.setdefault(without, set()).add(case)
    attempts[("PrivateNetwork",)].add(SECOND_LAYER)
    asked = json.dumps([[without, sorted(cases)] for without, cases in attempts.items()])
    command = [PYTHON, f"{TESTS}/systemd/weak_units.py", asked]
    done = rig.machine.run(command, env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=240)
    return dict(zip(attempts, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("without", "case"), FOUND_OUT, ids=[f"{one[0]}-{case}" for one, case in FOUND_OUT])
def test_a_weak_unit_is_found_out(
    weak: dict[tuple[str, ...], dict[str, str]], without: tuple[str, ...], case: str
) -> None:
    """With all properties, and nothing else of ours, the case is denied; without this one it gets through."""
    assert weak[()][case].startswith("denied"), weak[()][case]
    assert weak[without][case].startswith("allowed"), weak[without][case]


def test_without_a_network_of_its_own_the_packet_filter_holds(weak: dict[tuple[str, ...], dict[str, str]]) -> None:
    """A unit that has lost PrivateNetwork= reaches no listener of the host: its uid is refused."""
    assert weak[("PrivateNetwork",)][SECOND_LAYER].startswith("denied"), weak[("PrivateNetwork",)]
