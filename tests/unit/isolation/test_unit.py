"""Properties of units as values: by version, by choice, and never a path that systemd would read otherwise."""

from __future__ import annotations

import pytest

from cloister.errors import UnsupportedError
from cloister.isolation import unit

ALWAYS = {
    "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "AmbientCapabilities": "", "ProtectSystem": "strict",
    "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes", "DevicePolicy": "closed", "PrivateIPC": "yes",
    "PrivateUsers": "yes", "PrivateMounts": "yes", "ProtectKernelModules": "yes", "ProtectControlGroups": "yes",
    "ProtectClock": "yes", "RestrictRealtime": "yes", "LockPersonality": "yes", "KeyringMode": "private",
    "RemoveIPC": "yes", "UMask": "0077", "SystemCallArchitectures": "native", "SystemCallErrorNumber": "EPERM",
    "LimitCORE": "0", "Delegate": "no", "NotifyAccess": "none", "KillMode": "mixed", "Slice": "cloister.slice",
    "ProtectProc": "invisible",
}  # fmt: skip
NOT_NESTED = {
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelLogs": "yes",
}


def _box(systemd: int = 252, **choices: object) -> unit.UnitBox:
    values: dict[str, object] = {
        "systemd": systemd, "account": "cl-pi-alice", "shim": "/opt/cloister/bin/cloister",
        "etc_directory": "/run/cloister/etc/0011", "merged_usr": True,
    }  # fmt: skip
    return unit.UnitBox(**(values | choices))  # type: ignore[arg-type]


def _values(name: str, box: unit.UnitBox) -> list[str]:
    return [value for key, value in unit.properties(box) if key == name]


@pytest.mark.parametrize("version", range(252, 263))
def test_every_version_gets_what_all_have(version: int) -> None:
    """The same walls from 252 to 262, once each; as the account, in the empty tree, without a network."""
    found = dict(unit.properties(_box(version)))

    assert found.items() >= {**ALWAYS, **NOT_NESTED, "User": "cl-pi-alice", "Group": "cl-pi-alice"}.items()
    assert found["RootDirectory"] == "/run/cloister/root"
    assert found["PrivateNetwork"] == "yes"


@pytest.mark.parametrize("name", ["PrivatePIDs", "BindLogSockets"])
def test_what_came_later_is_asked_of_those_that_know_it(name: str) -> None:
    """systemd-run refuses what it does not know, so a version gets nothing that is younger than it."""
    assert [bool(_values(name, _box(version))) for version in (252, 256, 257, 258)] == [False, False, True, True]


def test_older_systemd_is_refused() -> None:
    """251 is not tried; 252 is the oldest."""
    with pytest.raises(UnsupportedError, match="needs systemd 252"):
        unit.properties(_box(251))
    assert unit.properties(_box(252))


def test_nested_lifts_what_a_sandbox_inside_needs_and_nothing_else() -> None:
    """Namespaces, mounts and a bare /proc; all other walls stay, the network's above all."""
    nested, plain = dict(unit.properties(_box(nested=True))), dict(unit.properties(_box()))

    assert plain.keys() - nested.keys() == NOT_NESTED.keys()
    assert nested.items() >= ALWAYS.items()
    assert nested["PrivateNetwork"] == "yes"
    assert any("@mount" in value.split() for value in _values("SystemCallFilter", _box(nested=True)))
    assert not any("@mount" in value.split() for value in _values("SystemCallFilter", _box()))


def test_the_filter_begins_with_what_is_allowed() -> None:
    """With refusals first, systemd would allow all else."""
    for nested in (False, True):
        assert _values("SystemCallFilter", _box(nested=nested))[0] == "@system-service"


def test_landlock_and_our_own_filter_can_be_installed() -> None:
    """252 has no @sandbox, so the calls of the shim are named."""
    allowed = " ".join(value for value in _values("SystemCallFilter", _box()) if not value.startswith("~")).split()

    assert set(allowed) >= {"seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}


def test_write_execute_and_netlink_are_the_policys() -> None:
    """A JIT needs one, Node the other; each is refused where the policy says so."""
    assert _values("MemoryDenyWriteExecute", _box()) == []
    assert _values("MemoryDenyWriteExecute", _box(write_execute=False)) == ["yes"]
    assert _values("RestrictAddressFamilies", _box()) == ["AF_UNIX AF_INET AF_INET6 AF_NETLINK"]
    assert _values("RestrictAddressFamilies", _box(netlink=False)) == ["AF_UNIX AF_INET AF_INET6"]


def test_an_interface_brings_no_other_weakening() -> None:
    """In mode `internet` the unit keeps a network namespace of its own; only systemd's list of addresses goes."""
    wider, plain = dict(unit.properties(_box(internet=True))), dict(unit.properties(_box()))

    assert wider["PrivateNetwork"] == "yes"
    assert plain.keys() - wider.keys() == {"IPAddressDeny", "IPAddressAllow"}
    assert wider.items() <= plain.items()


def test_limits_are_written_in_systemds_words() -> None:
    """Bytes, no swap beside them, tasks, percent, seconds, descriptors, share of the disks; nothing without a limit."""
    limits = unit.UnitLimits(
        memory_bytes=1 << 30, tasks=100, cpu_percent=150, runtime_s=90, open_files=512, io_weight=50, oom="continue"
    )
    found = dict(unit.properties(_box(limits=limits, tmpfs_bytes=4096)))

    assert found.items() >= {
        ("MemoryMax", "1073741824"), ("MemorySwapMax", "0"), ("TasksMax", "100"), ("CPUQuota", "150%"),
        ("RuntimeMaxSec", "90s"), ("LimitNOFILE", "512"), ("IOWeight", "50"), ("OOMPolicy", "continue"),
    }  # fmt: skip
    assert found["TemporaryFileSystem"].endswith(",size=4096")
    assert not {"MemoryMax", "TasksMax", "CPUQuota", "RuntimeMaxSec"} & dict(unit.properties(_box())).keys()


@pytest.mark.parametrize("path", ["/opt/my tools/cloister", "/opt/a:b", "/opt/100%", "/opt/$x", 'x"', "relative"])
@pytest.mark.parametrize("name", ["shim", "etc_directory"])
def test_paths_that_systemd_would_read_otherwise_are_refused(name: str, path: str) -> None:
    """Spaces, colons, percent and dollar signs mean something in a property; nothing is quoted, it is refused."""
    with pytest.raises(UnsupportedError, match="signs that systemd"):
        unit.properties(_box(**{name: path}))


def test_every_property_says_why() -> None:
    """The table is read by people: what each line prevents stands beside it."""
    assert all(one.why for one in unit.table())
