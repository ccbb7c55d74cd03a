"""What hostd asks of systemd over D-Bus makes the very unit that `systemd-run -p` makes of the same properties.

systemd writes down of a transient unit what it has understood, in its own words; both of these files are compared.
"""

import json

import pytest

from cloister.host import unit_dbus
from cloister.isolation import unit
from cloister.isolation.unit import UnitLimits
from support.machines import PYTHON, Machine

Properties = list[tuple[str, str]]
ACCOUNT = "cl-twin-alice"
SETUP = f"""
    id {ACCOUNT} 2>/dev/null || useradd --uid 1900000778 -U -M -s /usr/sbin/nologin {ACCOUNT}
    printf '[Service]\\nExecStart=/usr/bin/sleep 60\\n' >/run/systemd/system/cloister-watchdog.service
    systemctl daemon-reload
"""
CLEANUP = """
    systemctl stop cloister-watchdog.service
    rm /run/systemd/system/cloister-watchdog.service
    systemctl daemon-reload
"""
TWINS = """
import json, os, subprocess, sys
from cloister.host.systemd_manager import ManagerError
from cloister.host.systemd_units import UnitManager
from cloister.host.unit_dbus import start_call

def understood(unit):
    with open(f"/run/systemd/transient/{unit}") as file:
        return [line.strip() for line in file if "=" in line and not line.startswith(("Description=", "ExecStart"))]

def by_program(properties):
    flags = [word for name, value in properties for word in ("-p", f"{name}={value}")]
    words = ["systemd-run", "--quiet", "--no-block", "--unit=twin-a.service", *flags, "--", "/usr/bin/sleep", "60"]
    done = subprocess.run(words, capture_output=True)
    return "refused" if done.returncode else understood("twin-a.service")

def by_bus(properties):
    nothing = os.open("/dev/null", os.O_RDWR)
    with UnitManager() as bus:
        try:
            call = start_call("twin-b.service", properties, ("/usr/bin/sleep", "60"))
            bus.ask_start(call, (nothing, nothing, nothing))
            bus.await_answer()
        except ManagerError:
            return "refused"
        finally:
            os.close(nothing)
        return understood("twin-b.service")

told = []
for properties in json.load(sys.stdin):
    told.append([by_program(properties), by_bus(properties)])
    # The first process of a unit with PrivatePIDs= takes no TERM; a KILL that comes before it is there misses it.
    for words in (["stop", "--no-block"], ["kill", "-s", "KILL"], ["stop"], ["reset-failed"]):
        subprocess.run(["systemctl", *words, "twin-a.service", "twin-b.service"], capture_output=True)
print(json.dumps(told))
"""
OTHERS: Properties = [
    # Of what the floor lets through, that which no run has today; where a name stands twice both count or the last.
    ("CPUAccounting", "yes"), ("MemoryAccounting", "1"), ("TasksAccounting", "true"), ("IOAccounting", "yes"),
    ("MemoryHigh", "512M"), ("MemoryMax", "1T"), ("TasksMax", "infinity"), ("CPUQuota", "12.5%"), ("CPUWeight", "50"),
    ("RuntimeMaxSec", "2h"), ("TimeoutStartSec", "500ms"), ("ProcSubset", "pid"), ("ProtectHome", "tmpfs"),
    ("RestrictFileSystems", "@basic-api ext4"), ("RestrictAddressFamilies", "AF_UNIX"), ("SendSIGKILL", "yes"),
    ("KillSignal", "SIGKILL"), ("Nice", "5"), ("OOMScoreAdjust", "500"), ("SyslogIdentifier", "cloister-x"),
    ("LogNamespace", ""), ("IPAddressDeny", "10.0.0.0/8 fe80::/10 192.0.2.7"), ("IPAddressAllow", "127.0.0.2 ::1/128"),
    ("BindReadOnlyPaths", "-/nix:/x:norbind"), ("BindReadOnlyPaths", "/usr:/y:rbind"), ("InaccessiblePaths", "-+/x"),
    ("UMask", "0027"), ("LimitNOFILE", "infinity"), ("LimitNPROC", "100"), ("LimitFSIZE", "1G"), ("LimitDATA", "2G"),
    ("LimitSTACK", "8M"), ("LimitAS", "4G"), ("LimitMEMLOCK", "64K"), ("LimitCPU", "1h"), ("DevicePolicy", "strict"),
    ("ProtectProc", "noaccess"), ("OOMPolicy", "stop"), ("SystemCallFilter", "~@mount @swap"),
]  # fmt: skip
NETWORK: Properties = [
    # What only the unit beside a run in mode `internet` has.
    ("BindPaths", "/dev/null"), ("DeviceAllow", "/dev/null rw"), ("NetworkNamespacePath", "/proc/1/ns/net"),
    ("RestrictNamespaces", "user net mnt ipc uts pid"), ("BindsTo", "local-fs.target"), ("After", "local-fs.target"),
]  # fmt: skip
NEWER = {
    # With the version that has it; older ones refuse it, both ways.
    "PrivateUsersEx": ("self", 257), "PrivateTmpEx": ("disconnected", 257), "ProtectControlGroupsEx": ("strict", 257),
    "PrivatePIDs": ("yes", 257), "RootEphemeral": ("no", 254), "SetLoginEnvironment": ("no", 255),
    "BindLogSockets": ("no", 257),
}  # fmt: skip


def boxes(version: int) -> list[Properties]:
    """Return the properties of a plain run, and of one with everything that a policy can choose."""
    plain = {"systemd": version, "account": ACCOUNT, "shim": "/usr/bin/true", "etc_directory": "/etc"}
    limits = UnitLimits(
        memory_bytes=1 << 28, tasks=77, cpu_percent=150, runtime_s=90.5, open_files=4096, io_weight=50, oom="continue"
    )
    chosen = {"nested": True, "netlink": False, "write_execute": False, "internet": True, "tmpfs_bytes": 1 << 20}
    return [
        list(unit.properties(unit.UnitBox(**plain, merged_usr=True))),
        list(unit.properties(unit.UnitBox(**plain, merged_usr=False, groups=("users",), limits=limits, **chosen))),
    ]


def twins(machine: Machine, wanted: list[Properties]) -> list[tuple[object, object]]:
    """Return what systemd has understood of each list of properties: by `systemd-run`, and by our call."""
    machine.run(["sh", "-c", SETUP])
    try:
        done = machine.run([PYTHON, "-c", TWINS], input=json.dumps(wanted), timeout=60)
    finally:
        machine.run(["sh", "-c", CLEANUP])
    return [(one, other) for one, other in json.loads(done.stdout)]


def test_both_ways_make_the_same_unit(machine: Machine) -> None:
    """Every property that root may set means the same, on each version; what one of them does not know is refused."""
    listed = [*boxes(machine.version), OTHERS, NETWORK, *([(name, value)] for name, (value, _) in NEWER.items())]

    found = twins(machine, listed)

    for asked, (by_program, by_bus) in zip(listed, found, strict=True):
        assert by_bus == by_program, asked
        if len(asked) > 1:
            assert len(by_bus) >= len({name for name, _ in asked}), asked
    refused = [by_bus == "refused" for _, by_bus in found[-len(NEWER) :]]
    assert refused == [machine.version < since for _, since in NEWER.values()]
    named = {name for asked in listed for name, _ in asked} | set(NEWER)
    assert named == set(unit_dbus.FORMS) - {"Description"}


@pytest.mark.parametrize(
    "suite", ["trixie", pytest.param("forky", marks=pytest.mark.slow)], indirect=True, scope="session"
)  # where the values exist
def test_a_stricter_word_is_never_lost(machine: Machine) -> None:
    """Where a property was a flag once, its other values reach systemd too: systemd-run 257 itself refuses them."""
    stricter = {"PrivateUsers": "self", "PrivateTmp": "disconnected", "ProtectControlGroups": "strict"}

    found = twins(machine, [[one] for one in stricter.items()])

    for (name, value), (_, by_bus) in zip(stricter.items(), found, strict=True):
        assert f"{name}={value}" in by_bus
