"""The floor under plans of units: what the compiler makes is above it, and one thing worse is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloister.errors import StepError
from cloister.host import unit_floor
from cloister.isolation import unit
from cloister.plan.steps import Plan
from cloister.plan.unit import Account, Grant, UnitLaunch, UnitMount

PLANS = Path(__file__).parents[2] / "golden" / "unit_plans"
PLAN = msgspec.json.decode((PLANS / "shell.257.json").read_bytes(), type=Plan)


def launch(plan: Plan = PLAN) -> UnitLaunch:
    """Return the unit of a plan."""
    assert plan.launch.unit is not None
    return plan.launch.unit


ACCOUNT = Account(name=launch().account, uid=launch().uid, agent=PLAN.agent, user="alice")
SHIM = next(value.partition(":")[0] for name, value in launch().properties if value.endswith(unit.SHIM))


@pytest.fixture(autouse=True)
def roots_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file of the host be root's, so that only the rules on names are tried here."""
    monkeypatch.setattr(unit_floor.os, "lstat", lambda _: ROOTS)


class ROOTS:
    """What lstat(2) says of a directory of root's."""

    st_uid = 0
    st_mode = 0o040755


def bounds(*, nested: bool = False, repository: str = "") -> unit_floor.Bounds:
    """Return what the golden plan is held against."""
    grant = Grant(user="alice", agent=PLAN.agent, account=ACCOUNT.name, roots=("~",), nested=nested)
    return unit_floor.Bounds(grant, ACCOUNT, launch().workspace, (SHIM,), lambda _: True, repository=repository)


def compiled(*, nested: bool = False) -> UnitLaunch:
    """Return the golden unit with properties as the compiler makes them for other choices."""
    box = unit.UnitBox(
        systemd=257, account=ACCOUNT.name, shim=SHIM, etc_directory="/run/cloister/etc/00", merged_usr=True,
        nested=nested,
    )  # fmt: skip
    return msgspec.structs.replace(launch(), properties=unit.properties(box))


def changed(**changes: Any) -> Plan:
    """Return the golden plan with another unit."""
    return with_launch(unit=msgspec.structs.replace(launch(), **changes))


def with_launch(**changes: Any) -> Plan:
    """Return the golden plan with another launch."""
    step = msgspec.structs.replace(PLAN.launch, **changes)
    return msgspec.structs.replace(PLAN, steps=(*PLAN.steps[:-1], step))


def with_property(name: str, value: str | None) -> Plan:
    """Return the golden plan with one property replaced; None leaves it out."""
    kept = tuple(one for one in launch().properties if one[0] != name)
    return changed(properties=kept if value is None else (*kept, (name, value)))


def with_mount(**mount: Any) -> Plan:
    """Return the golden plan with one more mount."""
    return changed(mounts=(*launch().mounts, UnitMount(**mount)))


@pytest.mark.parametrize("name", sorted(path.name for path in PLANS.glob("*.json")))
def test_what_the_compiler_makes_is_above(name: str) -> None:
    """Every golden plan passes."""
    plan = msgspec.json.decode((PLANS / name).read_bytes(), type=Plan)
    account = Account(name=launch(plan).account, uid=launch(plan).uid, agent=plan.agent, user="alice")
    network = bool(plan.launch.pasta)
    grant = Grant(user="alice", agent=plan.agent, account=account.name, roots=("~",), network=network)
    held = unit_floor.Bounds(grant, account, launch(plan).workspace, (SHIM,), lambda _: network)
    assert unit_floor.check_plan(plan, held) == launch(plan)


@pytest.mark.parametrize("version", range(252, 259))
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("internet", [False, True])
def test_every_choice_of_the_compiler_is_above(version: int, *, nested: bool, internet: bool) -> None:
    """The compiler's table of properties and the floor agree for every version and choice, with all limits set."""
    limits = unit.UnitLimits(
        memory_bytes=4 << 30, tasks=512, cpu_percent=150, runtime_s=3630.5, open_files=1024, io_weight=50, oom="kill"
    )
    box = unit.UnitBox(
        systemd=version, account=ACCOUNT.name, shim=SHIM, etc_directory="/run/cloister/etc/00", merged_usr=False,
        nested=nested, internet=internet, write_execute=False, groups=("project",), limits=limits,
    )  # fmt: skip
    made = msgspec.structs.replace(launch(), properties=unit.properties(box))
    unit_floor.check_properties(made, bounds(nested=nested))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("User", "root"), ("User", "cl-pi-bob"), ("Group", "root"), ("NoNewPrivileges", "no"),
        ("CapabilityBoundingSet", "CAP_CHOWN"), ("AmbientCapabilities", "CAP_CHOWN"), ("ProtectSystem", "no"),
        ("RestrictNamespaces", "no"), ("RestrictNamespaces", None), ("PrivateUsers", "no"), ("ProtectProc", "default"),
        ("ProtectProc", None), ("ProtectHome", "no"), ("ProtectSystem", "full"),
        ("RootDirectory", "/"), ("RootDirectory", "/home/alice"), ("RootImage", "/x"),
        ("PrivateNetwork", "no"), ("PrivateNetwork", None), ("PrivateDevices", "no"), ("PrivateDevices", None),
        ("DeviceAllow", "/dev/kvm"), ("DevicePolicy", "auto"), ("RestrictSUIDSGID", "no"), ("RestrictSUIDSGID", None),
        ("SystemCallFilter", None), ("SystemCallFilter", "~@mount"), ("SystemCallFilter", ""), ("Delegate", "yes"),
        ("SystemCallErrorNumber", "0"), ("RestrictAddressFamilies", "AF_PACKET"),
        ("RestrictAddressFamilies", "~AF_UNIX"),
        ("ExecStartPre", "/bin/sh"), ("ExecStartPost", "+/bin/sh"), ("ExecStopPost", "!/x"), ("ExecReload", "/x"),
        ("Environment", "LD_PRELOAD=/x"), ("EnvironmentFile", "/x"), ("SetCredential", "a:b"),
        ("LoadCredential", "a:/b"),
        ("PassEnvironment", "X"), ("PAMName", "login"), ("Slice", "system.slice"), ("Type", "notify"),
        ("LimitCORE", None),
        ("NetworkNamespacePath", "/proc/1/ns/net"), ("JoinsNamespaceOf", "x.service"), ("BindPaths", "/home"),
        ("ReadWritePaths", "/"), ("TemporaryFileSystem", "/x"), ("MountImages", "/x"), ("LoadKernelModules", "x"),
        ("StandardOutput", "file:/etc/passwd"), ("StandardInput", "tty"), ("TTYPath", "/dev/tty1"),
        ("LogExtraFields", "x"),
        ("OnFailure", "x.service"), ("After", "ssh.service"), ("Restart", "always"), ("UMask", "0777\nUser=root"),
        ("Description", "x\nExecStartPre=/x"), ("WorkingDirectory", "/root"), ("IPAddressAllow", "any"),
        ("BindReadOnlyPaths", "/"), ("BindReadOnlyPaths", "/home"), ("BindReadOnlyPaths", "/root/x"),
        ("BindReadOnlyPaths", "/run/docker.sock"), ("BindReadOnlyPaths", "/var/lib/cloister"),
        ("BindReadOnlyPaths", "/usr:/"),
        ("BindReadOnlyPaths", "/usr:/proc/x"), ("BindReadOnlyPaths", "/usr/../home"),
        ("BindReadOnlyPaths", "/usr /home"),
        ("BindReadOnlyPaths", f"/usr/bin/sh:{unit.SHIM}"), ("BindReadOnlyPaths", "%h"), ("SupplementaryGroups", "a b"),
    ],
)  # fmt: skip
def test_no_worse_property(name: str, value: str | None) -> None:
    """A property of another value, one that is missing, and one that is not in the table: each is refused by name."""
    with pytest.raises(StepError) as refused:
        unit_floor.check_plan(with_property(name, value), bounds())
    assert refused.value.reference == "below-the-floor"
    assert (name in refused.value.where) or (value or "").split(":")[0] in refused.value.where


def test_a_property_stands_once() -> None:
    """The last of two would win, so NoNewPrivileges=yes before a second one is no promise."""
    twice = changed(properties=(*launch().properties, ("NoNewPrivileges", "yes")))
    with pytest.raises(StepError, match="stands twice"):
        unit_floor.check_plan(twice, bounds())


def test_only_the_grant_lets_an_agent_build_sandboxes() -> None:
    """The broker, were it an attacker's, cannot choose the weaker variant for an agent whose policy does not."""
    unit_floor.check_properties(compiled(nested=True), bounds(nested=True))
    with pytest.raises(StepError, match="lacks a property"):
        unit_floor.check_properties(compiled(nested=True), bounds())
    argv = (*PLAN.launch.argv, "--nested")
    unit_floor.check_plan(with_launch(argv=argv), bounds(nested=True))
    with pytest.raises(StepError, match="no sandbox of its own"):
        unit_floor.check_plan(with_launch(argv=argv), bounds())


PLAIN = [value for name, value in launch().properties if name == "SystemCallFilter"]


@pytest.mark.parametrize(
    ("filters", "named"),
    [
        ([*PLAIN, "@mount"], "@mount"), ([*PLAIN, "clone3"], "clone3"), ([*PLAIN, "setns unshare"], "setns"),
        ([*PLAIN, "@system-service"], "@system-service"), (["@known", *PLAIN[1:]], "@known"),
        (["@system-service bpf", *PLAIN[1:]], "bpf"), (["@system-service"], "~@clock"), (PLAIN[:-1], "~@mount"),
        (["~@clock", *PLAIN], "~@clock"), (["@system-service", "~@mount:EPERM"], "~@clock"),
    ],
)  # fmt: skip
def test_no_further_system_call(filters: list[str], named: str) -> None:
    """A list of system calls with a word more, or with a group fewer that is refused, is below the floor."""
    kept = tuple(one for one in launch().properties if one[0] != "SystemCallFilter")
    made = msgspec.structs.replace(launch(), properties=(*kept, *(("SystemCallFilter", line) for line in filters)))
    with pytest.raises(StepError, match="system calls") as refused:
        unit_floor.check_properties(made, bounds())
    assert refused.value.where == f"SystemCallFilter={named}"


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "ssh.service"}, {"unit": "cloister-run-other.service"}, {"account": "root"}, {"uid": 0},
        {"uid": 1000}, {"workspace": "/home/bob"}, {"project": "../../etc"}, {"project": ""}, {"state": ("../x",)},
        {"state": ("/etc",)}, {"state": ("a//b",)}, {"points": (("../x", "file"),)}, {"seeds": (("../x", "y"),)},
        {"seeds": (("x", "y" * (2 << 20)),)},
    ],
)  # fmt: skip
def test_no_other_name_or_place(changes: dict[str, Any]) -> None:
    """Unit, account, workspace and state are those that were granted, and names lead nowhere else."""
    with pytest.raises(StepError, match="refused by the host"):
        unit_floor.check_plan(changed(**changes), bounds())


def test_a_plan_starts_one_unit() -> None:
    """A plan without a launch, for another backend, or with a second one beside the one that is judged, is refused."""
    second = msgspec.structs.replace(PLAN.launch, unit=msgspec.structs.replace(launch(), account="root"))
    for steps in (PLAN.steps[:-1], with_launch(unit=None).steps, (*PLAN.steps, second), (second, *PLAN.steps)):
        with pytest.raises(StepError, match="starts no unit, or more than one"):
            unit_floor.check_plan(msgspec.structs.replace(PLAN, steps=steps), bounds())
    unit_floor.check_plan(PLAN, bounds())


def test_the_first_process_is_our_shim() -> None:
    """No other program, and no other half of the shim, is a unit's main process."""
    for argv in (("/bin/sh",), (unit.SHIM, "outer"), (unit.SHIM, "inner", "--ctl", "0"), ()):
        with pytest.raises(StepError, match="not our shim"):
            unit_floor.check_plan(with_launch(argv=argv), bounds())


WORKSPACE = launch().workspace
REPOSITORY = "/srv/git/.git"


@pytest.mark.parametrize(
    "mount",
    [
        {"kind": "rw", "target": "/x", "base": "host", "source": "/srv/x"},
        {"kind": "rw", "target": "/x", "base": "box"},
        {"kind": "rw", "target": "/x", "base": "none"},
        {"kind": "ro", "target": "/x", "base": "none"},
        {"kind": "tmpfs", "target": "/x", "base": "workspace"},
        {"kind": "ro", "target": "/etc/passwd", "base": "box"},
        {"kind": "tmpfs", "target": "/proc"},
        {"kind": "tmpfs", "target": "/sys/fs"},
        {"kind": "ro", "target": "/usr/bin", "base": "box"},
        {"kind": "tmpfs", "target": "/"},
        {"kind": "tmpfs", "target": "/x/../y"},
        {"kind": "tmpfs", "target": "x"},
        {"kind": "tmpfs", "target": "/x//y"},
        {"kind": "tmpfs", "target": "/.cloister/cloister-shim"},
        {"kind": "ro", "target": "/x", "base": "host", "source": "/"},
        {"kind": "ro", "target": "/x", "base": "host", "source": "/home"},
        {"kind": "ro", "target": "/x", "base": "host", "source": "/root"},
        {"kind": "ro", "target": "/x", "base": "host", "source": "/run/dbus"},
        {"kind": "ro", "target": "/x", "base": "host", "source": "/etc/cloister/keys"},
        {"kind": "ro", "target": "/x", "base": "host", "source": "/srv/../root"},
        {"kind": "ro", "target": "/x", "base": "state", "source": "../../x"},
        {"kind": "ro", "target": "/x", "base": "carry", "source": "/etc"},
        {"kind": "ro", "target": f"{WORKSPACE}/a", "base": "workspace", "source": "b"},
        {"kind": "rw", "target": "/elsewhere", "base": "workspace", "source": "b"},
        {"kind": "overlay", "target": f"{WORKSPACE}/a", "base": "workspace", "source": "a"},
        {"kind": "overlay", "target": "/x", "base": "workspace"},
        {"kind": "overlay", "target": "/x", "base": "copy"},
        {"kind": "overlay", "target": "/x", "base": "state"},
        {"kind": "overlay", "target": "/x", "base": "none"},
        {"kind": "rw", "target": "/x", "base": "copy", "source": "upper"},
        {"kind": "rw", "target": WORKSPACE, "base": "copy"},
        {"kind": "rw", "target": WORKSPACE, "base": "copy", "source": "work"},
        {"kind": "ro", "target": WORKSPACE, "base": "copy", "source": "upper"},
        {"kind": "rw", "target": "/home/alice/git", "base": "repository"},
        {"kind": "rw", "target": f"{REPOSITORY}x", "base": "repository"},
        {"kind": "rw", "target": "/x", "base": "repository", "source": "hooks"},
        {"kind": "rw", "target": f"{REPOSITORY}/hooks", "base": "repository"},
        {"kind": "ro", "target": f"{REPOSITORY}/..", "base": "repository", "source": ".."},
    ],
)
def test_no_other_mount(mount: dict[str, Any]) -> None:
    """Only workspace and state are writable, nothing covers the system, and every path stays in its base."""
    with pytest.raises(StepError, match="refused by the host"):
        unit_floor.check_plan(with_mount(**mount), bounds(repository=REPOSITORY))


def test_changes_may_be_kept_aside_and_a_repository_shown() -> None:
    """An overlay or a copy in the workspace's place, and the git directory that was walked to, each at its place."""
    others = tuple(mount for mount in launch().mounts if mount.target != WORKSPACE)
    git = (
        UnitMount(kind="rw", target=REPOSITORY, base="repository"),
        UnitMount(kind="ro", target=f"{REPOSITORY}/hooks", base="repository", source="hooks"),
    )
    for root in (
        UnitMount(kind="overlay", target=WORKSPACE, base="workspace"),
        UnitMount(kind="rw", target=WORKSPACE, base="copy", source="upper"),
    ):
        plan = changed(mounts=(*others, root, *git))
        assert unit_floor.check_plan(plan, bounds(repository=REPOSITORY)) == launch(plan)
        with pytest.raises(StepError, match="no git directory elsewhere"):
            unit_floor.check_plan(plan, bounds())


def test_a_mount_stands_once() -> None:
    """A second mount on a place would hide the first: a protected path would be writable again."""
    first = launch().mounts[0]
    with pytest.raises(StepError, match="two mounts on one place"):
        unit_floor.check_plan(changed(mounts=(*launch().mounts, first)), bounds())


def test_what_others_can_write_is_not_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host path with one level that is not root's, or that others may write, is refused, also as an optional one."""

    class Writable(ROOTS):
        st_mode = 0o040777

    class Alices(ROOTS):
        st_uid = 1000

    for status in (Writable, Alices):
        monkeypatch.setattr(unit_floor.os, "lstat", lambda path, status=status: status if path == "/srv" else ROOTS)
        with pytest.raises(StepError, match="only root may"):
            unit_floor.check_host_source("/srv/data", optional=True)
    unit_floor.check_host_source("/usr/share")
