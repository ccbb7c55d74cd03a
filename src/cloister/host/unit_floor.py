"""The floor under every plan of a run under systemd: what root does not do, whoever asks for it.

Written down apart from the compiler on purpose: two statements of one rule. A property that is not named here, a
value of another form, a name outside of ours, a path that root does not own: the whole plan is refused, and the
refusal names the step. Nothing is decided about what an agent should get; that is the policy's and the compiler's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator

from cloister.errors import StepError
from cloister.host.unit_caller import is_ours
from cloister.host.unit_floor_calls import worse_than_allowed
from cloister.host.unit_floor_network import wrong_network, wrong_pasta
from cloister.plan.steps import Launch, Plan
from cloister.plan.unit import (
    ACCOUNT_PREFIX,
    COPY_UPPER,
    SKELETON,
    SLICE,
    UNIT_PREFIX,
    Account,
    Grant,
    UnitLaunch,
    UnitMount,
)

SHIM_INSIDE = "/.cloister/cloister-shim"
ETC_COPIES = "/run/cloister/etc/"
_RUN = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")
_PROJECT = re.compile(r"[0-9a-f]{16}")
_NOT_GRANTED = "sudo cloister apply, if the policy says otherwise by now"
_LARGEST = {"properties": 256, "mounts": 4096, "state": 256, "argv": 4096}
_LARGEST_SEED = 1 << 20
_LONGEST_VALUE = 64 << 10

# systemd.exec(5), systemd.service(5), systemd.resource-control(5), systemd.kill(5), systemd.unit(5).
_YES = "yes|true|1"
_NUMBER = "[0-9]{1,18}[KMGT]?|infinity"
_SECONDS = r"[0-9.]{1,18}(us|ms|s|min|h|d)?|infinity"
_FAMILIES = "(none|AF_(UNIX|INET|INET6|NETLINK)( AF_(UNIX|INET|INET6|NETLINK))*)"
_CALLS = r"~?[@a-z0-9_:A-Z-]+( [@a-z0-9_:A-Z-]+)*"
_ALLOWED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("NoNewPrivileges", "PrivateDevices", "PrivateIPC", "ProtectKernelTunables", "ProtectKernelModules"),
            *("ProtectKernelLogs", "ProtectClock", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality"),
            *("RemoveIPC", "PrivateNetwork", "MountAPIVFS", "MemoryDenyWriteExecute", "PrivatePIDs"),
            *("CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting", "PrivateMounts"),
        ),
        _YES,
    ),
    "User": f"{ACCOUNT_PREFIX}[a-z0-9_-]+",
    "Group": f"{ACCOUNT_PREFIX}[a-z0-9_-]+",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "DevicePolicy": "closed|strict",
    "ProtectSystem": "strict",
    "ProtectHome": "yes|tmpfs",
    "ProtectProc": "invisible|ptraceable|noaccess",
    "ProcSubset": "all|pid",
    "ProtectControlGroups": "yes|strict|private",
    "ProtectControlGroupsEx": "yes|strict|private",
    "ProtectHostname": "yes|private",
    "PrivateTmp": "yes|disconnected",
    "PrivateTmpEx": "yes|disconnected",
    "PrivateUsers": "yes|self",
    "PrivateUsersEx": "yes|self",
    "RestrictNamespaces": _YES,
    "RestrictFileSystems": r"~?[@a-z0-9_.-]+( [@a-z0-9_.-]+)*",
    "RestrictAddressFamilies": _FAMILIES,
    "SystemCallFilter": _CALLS,
    "SystemCallErrorNumber": "EPERM",
    "SystemCallArchitectures": "native",
    "KeyringMode": "private",
    "TemporaryFileSystem": "/dev/shm:mode=1777,nosuid,nodev(,size=[0-9]{1,18})?",  # noqa: S108  # the unit's own
    "BindLogSockets": "no",
    "UMask": "0?0[0-7]{2}",
    "RootDirectory": re.escape(SKELETON),
    "RootEphemeral": "no",
    "WorkingDirectory": "/",
    "Slice": re.escape(SLICE),
    "Type": "exec",
    "NotifyAccess": "none",
    "Delegate": "no",
    "CollectMode": "inactive|inactive-or-failed",
    "StandardInput": "null",
    "StandardOutput": "null",
    "StandardError": "null",
    "KillMode": "mixed",
    "KillSignal": "SIG(TERM|KILL)",
    "SendSIGKILL": _YES,
    "TimeoutStopSec": _SECONDS,
    "TimeoutStartSec": _SECONDS,
    "RuntimeMaxSec": _SECONDS,
    "OOMPolicy": "stop|kill|continue",
    "OOMScoreAdjust": "[0-9]{1,4}",
    "MemoryMax": _NUMBER,
    "MemoryHigh": _NUMBER,
    "MemorySwapMax": _NUMBER,
    "TasksMax": _NUMBER,
    "CPUQuota": "[0-9.]{1,9}%",
    "CPUWeight": "[0-9]{1,5}",
    "IOWeight": "[0-9]{1,5}",
    **{f"Limit{name}": _NUMBER for name in ("CORE", "NOFILE", "NPROC", "FSIZE", "DATA", "STACK", "AS", "MEMLOCK")},
    "LimitCPU": _SECONDS,
    "IPAddressDeny": r"any|[0-9a-f.:/]+( [0-9a-f.:/]+)*",
    "IPAddressAllow": r"[0-9a-f.:/]+( [0-9a-f.:/]+)*|localhost",
    "SupplementaryGroups": "[a-z_][a-z0-9_-]{0,31}",
    "BindReadOnlyPaths": r"-?/[^\s:%\\\"'$]*(:/[^\s:%\\\"'$]*(:norbind|:rbind)?)?",
    "InaccessiblePaths": r"-?\+?/[^\s:%\\\"'$]*",
    "Description": r"[\w .,:/+@()-]{0,200}",
    "SyslogIdentifier": "cloister[a-z-]*",
    "LogNamespace": "",
    "SetLoginEnvironment": "no",
    "Nice": "1?[0-9]",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _ALLOWED.items()}
_REQUIRED = (
    *(
        "User",
        "Group",
        "PrivateNetwork",
        "NoNewPrivileges",
        "CapabilityBoundingSet",
        "AmbientCapabilities",
        "ProtectSystem",
    ),
    *("RootDirectory", "PrivateDevices", "DevicePolicy", "PrivateIPC", "PrivateTmp", "ProtectKernelModules"),
    *(
        "ProtectClock",
        "ProtectControlGroups",
        "RestrictRealtime",
        "TemporaryFileSystem",
        "PrivateUsers",
        "InaccessiblePaths",
        "ProtectProc",
    ),
    *("LockPersonality", "RestrictAddressFamilies", "SystemCallFilter", "SystemCallErrorNumber"),
    *("SystemCallArchitectures", "KeyringMode", "UMask", "Slice", "Delegate", "LimitCORE", "KillMode"),
)
_REQUIRED_WITHOUT_MOUNTS = (
    *("RestrictNamespaces", "RestrictSUIDSGID", "ProtectHostname", "ProtectKernelTunables", "ProtectKernelLogs"),
)
"""Unless the grant says `nested`: a sandbox of the agent's own needs namespaces and a bare /proc."""
_SEVERAL = frozenset({"SystemCallFilter", "BindReadOnlyPaths", "InaccessiblePaths", "IPAddressDeny"})
"""What may stand several times: everything else must not, as the last one would win."""
_NEVER_TARGETS = (
    *("/proc", "/sys", "/dev", "/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/boot", "/.cloister", "/run/systemd", "/run/dbus", "/run/host"),
)
_NEVER_SOURCES = ("/proc", "/sys", "/dev", "/run", "/home", "/root", "/boot", "/var/lib/cloister", "/etc/cloister")
_NEVER_WHOLE = ("/", "/var", "/var/lib", "/mnt", "/media", "/srv", "/tmp", "/var/tmp")  # noqa: S108  refused


class Bounds:
    """What of the grant, the request and the host a plan is held against. `shim` are the paths of our own helper.

    What may be lifted is the grant's word, never the plan's: the broker, which makes the plan, could be an attacker's.
    """

    def __init__(  # noqa: PLR0913  # made in one place
        self, grant: Grant, account: Account, workspace: str, shim: tuple[str, ...], filtered: Callable[[int], bool],
        *, repository: str = "",
    ) -> None:  # fmt: skip
        """Keep them; `filtered` says whether the packet filter of a uid is loaded, `repository` where git's is."""
        self.grant = grant
        self.account = account
        self.workspace = workspace
        self.repository = repository
        self.shim = shim
        self.filtered = filtered


def check_plan(plan: Plan, bounds: Bounds) -> UnitLaunch:
    """Return the unit of a plan that is above the floor.

    Raises:
        StepError: it is not; the message names the property, mount or word.
    """
    launches = [step for step in plan.steps if isinstance(step, Launch)]
    if len(launches) != 1 or (unit := launches[0].unit) is None:
        raise _refused("the plan starts no unit, or more than one", plan.run)
    _check_names(plan, unit, bounds)
    _check_argv(plan.launch.argv, nested=bounds.grant.nested)
    check_properties(unit, bounds)
    _check_network(plan, unit, bounds)
    _check_state(unit)
    targets: set[str] = set()
    if len(unit.mounts) > _LARGEST["mounts"]:
        raise _refused("too many mounts", str(len(unit.mounts)))
    for mount in unit.mounts:
        _check_mount(mount, bounds)
        if mount.target in targets:
            raise _refused("two mounts on one place", mount.target)
        targets.add(mount.target)
    return unit


def check_properties(unit: UnitLaunch, bounds: Bounds) -> None:
    """Hold the properties against the table.

    Raises:
        StepError: one is unknown, has a value of another form, stands twice, or is missing.
    """
    if len(unit.properties) > _LARGEST["properties"]:
        raise _refused("too many properties", str(len(unit.properties)))
    seen: set[str] = set()
    for name, value in unit.properties:
        shown = f"{name}={value[:200]}"
        pattern = _PATTERNS.get(name)
        if pattern is None:
            raise _refused("root sets no such property", shown)
        if len(value) > _LONGEST_VALUE or not pattern.fullmatch(value):
            raise _refused("a property with a value that root does not set", shown)
        if name in seen and name not in _SEVERAL:
            raise _refused("a property stands twice", shown)
        seen.add(name)
        if name in {"User", "Group"} and value != unit.account:
            raise _refused("the unit runs as somebody else", shown)
        if name == "BindReadOnlyPaths":
            _check_bind(value, bounds)
    required = (*_REQUIRED, *(() if bounds.grant.nested else _REQUIRED_WITHOUT_MOUNTS))
    missing = [name for name in required if name not in seen]
    if missing:
        remedy = _NOT_GRANTED if missing[0] in _REQUIRED_WITHOUT_MOUNTS else ""
        raise _refused("the unit lacks a property", missing[0], remedy=remedy)
    filters = [value for name, value in unit.properties if name == "SystemCallFilter"]
    if worse := worse_than_allowed(filters, nested=bounds.grant.nested):
        raise _refused("system calls that no agent of this policy gets", f"SystemCallFilter={worse[:200]}")


def _check_names(plan: Plan, unit: UnitLaunch, bounds: Bounds) -> None:
    if not _RUN.fullmatch(plan.run) or unit.unit != f"{UNIT_PREFIX}{plan.run}.service":
        raise _refused("the unit has a name that is not the run's", unit.unit)
    account = bounds.account
    if (unit.account, unit.uid) != (account.name, account.uid) or not is_ours(unit.uid):
        raise _refused("the unit runs as an account that was not granted", f"{unit.account} ({unit.uid})")
    if not unit.account.startswith(ACCOUNT_PREFIX):
        raise _refused("an account of ours begins with cl-", unit.account)
    if plan.agent != account.agent:
        raise _refused("the plan is another agent's", plan.agent)
    if unit.workspace != bounds.workspace:
        raise _refused("the workspace is not the one that was granted", unit.workspace)


def _check_argv(argv: tuple[str, ...], *, nested: bool) -> None:
    if argv[:2] != (SHIM_INSIDE, "inner") or "--unit" not in argv or len(argv) > _LARGEST["argv"]:
        raise _refused("the unit's first process is not our shim", " ".join(argv[:2]))
    if "--nested" in argv and not nested:
        raise _refused("the policy lets this agent build no sandbox of its own", "--nested", remedy=_NOT_GRANTED)
    if any("\0" in word or "\n" in word for word in argv):
        raise _refused("a word of the unit's command has a line break", argv[0])


def _check_network(plan: Plan, unit: UnitLaunch, bounds: Bounds) -> None:
    """Hold what connects the unit against the floor: without the grant's word, its network is an empty one."""
    launch = plan.launch
    if unit.network is None:
        if launch.pasta or launch.ruleset:
            raise _refused("pasta has no unit to run in", unit.unit)
        if ("IPAddressDeny", "any") not in unit.properties:
            raise _refused("the unit lacks a property", "IPAddressDeny=any")
        return
    if not bounds.grant.network:
        raise _refused("the policy gives this agent no internet", unit.account, remedy=_NOT_GRANTED)
    if not bounds.filtered(unit.uid):
        raise _refused("the packet filter of this account is not loaded", unit.account, remedy="sudo cloister apply")
    if unit.network.argv != (SHIM_INSIDE, "network"):
        raise _refused("the first process of the network's unit is not our shim", " ".join(unit.network.argv)[:200])
    binds = tuple(value for name, value in unit.properties if name == "BindReadOnlyPaths")
    for what, where in (*wrong_network(plan.run, unit, binds), *wrong_pasta(launch.pasta, launch.ruleset)):
        raise _refused(what, where)
    for program in (launch.pasta[0], launch.nft):
        check_host_source(program)


def _check_bind(value: str, bounds: Bounds) -> None:
    source, _, rest = value.removeprefix("-").partition(":")
    target = rest.partition(":")[0] or source
    if target == SHIM_INSIDE:
        if source not in bounds.shim:
            raise _refused("the shim is not ours", value)
    elif target in {"/", SHIM_INSIDE} or _below(target, ("/proc", "/sys", "/dev", "/run", "/.cloister")):
        raise _refused("nothing is mounted there", value)
    check_host_source(source, optional=value.startswith("-"))


def _check_state(unit: UnitLaunch) -> None:
    if not _PROJECT.fullmatch(unit.project):
        raise _refused("a project's name is 16 hexadecimal digits", unit.project)
    if max(len(unit.state), len(unit.points), len(unit.seeds)) > _LARGEST["state"]:
        raise _refused("too many directories of state", str(len(unit.state)))
    names = (*unit.state, *(name for name, _ in unit.points), *(name for name, _ in unit.seeds))
    for name in names:
        if not _plain(name):
            raise _refused("a directory of state leaves its place", name)
    if sum(len(text) for _, text in unit.seeds) > _LARGEST_SEED:
        raise _refused("too much is written into the state", unit.project)


def _check_mount(mount: UnitMount, bounds: Bounds) -> None:
    shown = f"{mount.kind} {mount.target}"
    if not mount.target.startswith("/") or not _plain(mount.target[1:]):
        raise _refused("a mount's place is not absolute and plain", shown)
    if _below(mount.target, _NEVER_TARGETS):
        raise _refused("nothing is mounted there", shown)
    if (mount.kind in {"tmpfs", "mask-file", "mask-directory"}) != (mount.base == "none"):
        raise _refused("a mount of this kind has no such source", f"{shown} from {mount.base}")
    if mount.kind == "rw" and mount.base not in {"workspace", "copy", "repository", "state"}:
        raise _refused("only workspace and state are writable", f"{shown} from {mount.base}")
    _check_users(mount, shown, bounds)
    if mount.base == "host":
        check_host_source(mount.source, optional=mount.optional)
    elif mount.source and not _plain(mount.source):
        raise _refused("a mount's source leaves its base", f"{shown} from {mount.source}")


def _check_users(mount: UnitMount, shown: str, bounds: Bounds) -> None:
    """Hold mounts of what is the user's against what was walked to: each stays where it lies on the host."""
    if mount.kind == "overlay" and (mount.base != "workspace" or mount.source):
        raise _refused("changes are kept aside of the whole workspace, or not at all", f"{shown} from {mount.base}")
    if mount.base == "workspace" and mount.target != _joined(bounds.workspace, mount.source):
        raise _refused("what is in the workspace stays at its place", shown)
    if mount.base == "copy" and (mount.kind, mount.target, mount.source) != ("rw", bounds.workspace, COPY_UPPER):
        raise _refused("a copy takes the place of the workspace, as a whole", f"{shown} from {mount.source}")
    if mount.base == "repository":
        if not bounds.repository:
            raise _refused("the workspace has no git directory elsewhere", shown)
        if mount.target != _joined(bounds.repository, mount.source):
            raise _refused("what is in the git directory stays at its place", shown)


def check_host_source(path: str, *, optional: bool = False) -> None:
    """Refuse a path of the host that anybody but root could change, or that shows what is not an agent's to see.

    Raises:
        StepError: it is such a path, or does not exist.
    """
    if not path.startswith("/") or (path != "/" and not _plain(path[1:])):
        raise _refused("a path of the host is not absolute and plain", path)
    if path in _NEVER_WHOLE or (_below(path, _NEVER_SOURCES) and not path.startswith(ETC_COPIES)):
        raise _refused("this part of the host is shown to no agent", path)
    try:
        for place in _levels(os.path.realpath(path), path):
            status = os.lstat(place)
            if status.st_uid != 0 or (status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)):
                raise _refused("only root may be able to change what is mounted by its path", place)
    except FileNotFoundError as error:
        # A copy of /etc is made by root after this; where it is not, systemd refuses the unit.
        if not optional and not path.startswith(ETC_COPIES):
            raise _refused("is not there, so it cannot be mounted", path) from error
    except OSError as error:
        if not optional:
            raise _refused(f"cannot be mounted: {error.strerror}", path) from error


def _levels(*paths: str) -> Iterator[str]:
    for path in paths:
        yield "/"
        for index, char in enumerate(path):
            if char == "/" and index:
                yield path[:index]
        yield path


def _plain(path: str) -> bool:
    """Whether a relative path is what it says: no empty part, no dots, no NUL."""
    return "\0" not in path and not any(part in {"", ".", ".."} for part in path.split("/"))


def _below(path: str, places: tuple[str, ...]) -> bool:
    return path == "/" or any(path == place or path.startswith(place + "/") for place in places)


def _joined(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{name}" if name else base


def _refused(message: str, where: str, remedy: str = "") -> StepError:
    return StepError(
        "below-the-floor", f"refused by the host: {message}", where=where,
        remedy=remedy or "this is a fault of the plan: cloister plan shows it; please report it",
    )  # fmt: skip
