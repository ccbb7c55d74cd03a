"""What must change for a system to be as declared: two states as values, and the steps between them.

`Desired` is what the policy wants, `Found` what the host has, `Made` what earlier applications put there. The same
three always give the same steps, and none when nothing differs. What is not ours and stands in the way is refused,
never overwritten.
"""

from __future__ import annotations

import hashlib

import msgspec

from cloister.errors import StepError
from cloister.plan import bridge
from cloister.plan.system import (
    AnySystemStep,
    DisableUnit,
    EditLines,
    EnableUnit,
    InstallFile,
    LoadFirewall,
    MakeAccounts,
    MakeDirectory,
    MakeLink,
    ReloadManager,
    ReloadUnit,
    RemoveBridge,
    RemoveDirectory,
    RemoveFile,
    RemoveLink,
    RestartUnit,
    StartUnit,
    StopUnit,
    SystemPlan,
    UnloadFirewall,
)
from cloister.plan.unit import Account

HEAD = "# Written by `cloister apply`; changes here are found and replaced.\n"
"""How files of ours begin that may have comments."""
UNIT_DIRECTORY = "/etc/systemd/system/"


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all values here share."""


class File(Value, frozen=True):
    """A file that shall be there, whole."""

    path: str
    text: str
    mode: int = 0o644
    gid: int = 0


class Directory(Value, frozen=True):
    """A directory of root's that shall be there."""

    path: str
    mode: int = 0o755
    as_found: bool = False
    """One that is there already keeps its owner and mode: it is the system's."""


class Link(Value, frozen=True):
    """A symbolic link that shall be there."""

    path: str
    target: str


class Wanted(Value, frozen=True):
    """How a unit shall be."""

    unit: str
    enabled: bool = True
    active: bool = True
    restart_for: tuple[str, ...] = ()
    """Files whose change restarts it, where it runs."""
    reload_for: tuple[str, ...] = ()
    """Files whose change it reads while it runs."""
    restart_why: str = ""
    """A reason of its own to restart it, such as a renewed key."""


class Desired(Value, frozen=True):
    """A system as the policy wants it."""

    accounts: tuple[Account, ...] = ()
    daemons: tuple[str, ...] = ()
    """Users of our own processes."""
    directories: tuple[Directory, ...] = ()
    links: tuple[Link, ...] = ()
    files: tuple[File, ...] = ()
    denied: tuple[str, ...] = ()
    """Accounts that may use neither cron(8) nor at(1)."""
    firewall: str | None = None
    """The packet filter of the accounts; None: none."""
    units: tuple[Wanted, ...] = ()
    """In the order in which they are started."""
    stop: tuple[tuple[str, str], ...] = ()
    """Runs that are to end, each with the reason."""


class FoundFile(Value, frozen=True):
    """A file that is there."""

    text: str
    mode: int
    uid: int
    gid: int


class FoundUnit(Value, frozen=True):
    """A unit that systemd knows."""

    active: bool
    enabled: bool


class Found(Value, frozen=True):
    """What the host has at the places that matter."""

    files: dict[str, FoundFile] = msgspec.field(default_factory=dict)
    directories: dict[str, tuple[int, int, int]] = msgspec.field(default_factory=dict)
    """Mode, uid and gid."""
    links: dict[str, str] = msgspec.field(default_factory=dict)
    odd: tuple[str, ...] = ()
    """Places where something of another kind stands."""
    names: tuple[str, ...] = ()
    """Users there are."""
    lines: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Of the files by which cron and at are denied or allowed, where these exist."""
    units: dict[str, FoundUnit] = msgspec.field(default_factory=dict)
    firewall: str | None = None
    """The file of the packet filter."""
    firewall_trouble: str = ""
    """Why the kernel's is not what that file says."""


class Made(Value, frozen=True):
    """What Cloister put into the system."""

    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Path, and the SHA-256 of what was written."""
    directories: tuple[str, ...] = ()
    links: dict[str, str] = msgspec.field(default_factory=dict)
    units: tuple[str, ...] = ()
    lines: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)


def digest(text: str) -> str:
    """Return the SHA-256 of a file's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def made(desired: Desired, found: Found, before: Made) -> Made:
    """Return what is ours once the system is as desired."""
    lines = {path: tuple(name for name in desired.denied) for path in found.lines if path.endswith(".deny")}
    known = {path: names for path, names in before.lines.items() if path not in lines and path in found.lines}
    return Made(
        files={file.path: digest(file.text) for file in desired.files},
        directories=_our_directories(desired, found, before),
        links={link.path: link.target for link in desired.links},
        units=tuple(wanted.unit for wanted in desired.units),
        lines={path: names for path, names in (known | lines).items() if names},
    )


def _our_directories(desired: Desired, found: Found, before: Made) -> tuple[str, ...]:
    """Return directories that we made: not those that were there, and those that could not be removed yet."""
    new = [one.path for one in desired.directories if one.path not in found.directories]
    kept = [path for path in before.directories if path in found.directories]
    again = [one.path for one in desired.directories if one.path in before.directories]
    return tuple(dict.fromkeys((*kept, *again, *new)))


def both(one: Made, other: Made) -> Made:
    """Return what may be ours while a plan is under way: what was before it, and what will be after it."""
    return Made(
        files=one.files | other.files,
        directories=tuple(dict.fromkeys((*one.directories, *other.directories))),
        links=one.links | other.links,
        units=tuple(dict.fromkeys((*one.units, *other.units))),
        lines={
            path: tuple(dict.fromkeys((*one.lines.get(path, ()), *other.lines.get(path, ()))))
            for path in {**one.lines, **other.lines}
        },
    )


def difference(desired: Desired, found: Found, before: Made, unfinished: tuple[AnySystemStep, ...] = ()) -> SystemPlan:
    """Return the steps that make a system as desired.

    Args:
        desired: what the policy wants.
        found: what the host has.
        before: what is ours there.
        unfinished: the steps of an application that was killed; what cannot be seen on disk is done again.

    Raises:
        StepError: `not-ours`: something stands in the way that Cloister did not make.
    """
    _refuse_strange(desired, found, before)
    things: list[AnySystemStep] = [
        *_accounts(desired, found),
        *_directories(desired, found),
        *_links(desired, found, before),
        *_files(desired, found),
        *_gone(desired, found, before),
        *_lines(desired, found, before),
        *_firewall(desired, found),
    ]
    changed = {step.path for step in things if isinstance(step, InstallFile | RemoveFile)}
    changed |= {step.path for step in unfinished if isinstance(step, InstallFile | RemoveFile)}
    reload = any(path.startswith(UNIT_DIRECTORY) for path in changed)
    runs: list[AnySystemStep] = [StopUnit(unit=unit, why=why, transient=True) for unit, why in desired.stop]
    # Not granted any more: after hostd's list says so, so that none is started again meanwhile. Without a packet filter
    # from now on: before it is gone, and after nobody listens any more.
    early, late = (runs, []) if desired.firewall is None else ([], runs)
    steps = [
        *_ending(desired, found, before),
        *early,
        *things,
        *late,
        *([ReloadManager()] if reload else []),
        *_starting(desired, found, changed),
    ]
    return SystemPlan(steps=tuple(steps), notices=() if unfinished else _by_hand(desired, found, before))


def _refuse_strange(desired: Desired, found: Found, before: Made) -> None:
    ours = {*before.files, *before.directories, *before.links}
    for path in found.odd:
        raise StepError(
            "not-ours", "something else stands where Cloister puts a file", where=path, remedy=f"ls -l {path}"
        )
    for file in desired.files:
        there = found.files.get(file.path)
        if there is None or file.path in ours or there.text == file.text or there.text.startswith(HEAD):
            continue
        remedy = f"mv {file.path} {file.path}.old"
        raise StepError("not-ours", "there is a file that Cloister did not write", where=file.path, remedy=remedy)
    for link in desired.links:
        if found.links.get(link.path, link.target) != link.target and link.path not in ours:
            remedy = f"rm {link.path}"
            raise StepError("not-ours", "there is a link that Cloister did not make", where=link.path, remedy=remedy)


def _accounts(desired: Desired, found: Found) -> list[AnySystemStep]:
    missing = tuple(account for account in desired.accounts if account.name not in found.names)
    daemons = tuple(name for name in desired.daemons if name not in found.names)
    return [MakeAccounts(accounts=missing, daemons=daemons)] if missing or daemons else []


def _directories(desired: Desired, found: Found) -> list[AnySystemStep]:
    steps: list[AnySystemStep] = []
    for one in desired.directories:
        there = found.directories.get(one.path)
        if there is None or (not one.as_found and there != (one.mode, 0, 0)):
            steps.append(MakeDirectory(path=one.path, mode=one.mode, before=there))
    return steps


def _links(desired: Desired, found: Found, before: Made) -> list[AnySystemStep]:
    steps: list[AnySystemStep] = []
    for link in desired.links:
        there = found.links.get(link.path)
        if there == link.target:
            continue
        if there is not None:
            steps.append(RemoveLink(path=link.path, target=there))
        steps.append(MakeLink(path=link.path, target=link.target))
    wanted = {link.path for link in desired.links}
    gone = [path for path in before.links if path not in wanted and path in found.links]
    return steps + [RemoveLink(path=path, target=found.links[path]) for path in gone]


def _files(desired: Desired, found: Found) -> list[AnySystemStep]:
    steps: list[AnySystemStep] = []
    for file in desired.files:
        there = found.files.get(file.path)
        if there is None:
            steps.append(InstallFile(path=file.path, text=file.text, mode=file.mode, gid=file.gid))
        elif there != FoundFile(text=file.text, mode=file.mode, uid=0, gid=file.gid):
            steps.append(_changed(file, there))
    return steps


def _changed(file: File, there: FoundFile) -> InstallFile:
    return InstallFile(
        path=file.path, text=file.text, mode=file.mode, gid=file.gid,
        before=there.text, before_mode=there.mode, before_uid=there.uid, before_gid=there.gid,
    )  # fmt: skip


def _gone(desired: Desired, found: Found, before: Made) -> list[AnySystemStep]:
    files = {file.path for file in desired.files}
    directories = {one.path for one in desired.directories}
    steps: list[AnySystemStep] = []
    for path in before.files:
        there = found.files.get(path)
        if path not in files and there is not None:
            steps.append(RemoveFile(path=path, before=there.text, mode=there.mode, uid=there.uid, gid=there.gid))
    for path in sorted(before.directories, reverse=True):  # what is below comes first
        if path not in directories and path in found.directories:
            mode, uid, gid = found.directories[path]
            steps.append(RemoveDirectory(path=path, mode=mode, uid=uid, gid=gid))
    return steps


def _firewall(desired: Desired, found: Found) -> list[AnySystemStep]:
    if desired.firewall is None:
        return [] if found.firewall is None else [UnloadFirewall(before=found.firewall)]
    if desired.firewall == found.firewall and not found.firewall_trouble:
        return []
    return [LoadFirewall(text=desired.firewall, before=found.firewall)]


def _lines(desired: Desired, found: Found, before: Made) -> list[AnySystemStep]:
    """Deny our accounts cron and at where the host has such lists; a list of those allowed is shorter still."""
    steps: list[AnySystemStep] = []
    for path, lines in found.lines.items():
        ours = before.lines.get(path, ())
        if path.endswith(".allow"):
            add: tuple[str, ...] = ()
            remove = tuple(name for name in desired.denied if name in lines)
        else:
            add = tuple(name for name in desired.denied if name not in lines)
            remove = tuple(name for name in ours if name not in desired.denied and name in lines)
        if add or remove:
            steps.append(EditLines(path=path, add=add, remove=remove))
    return steps


def _ending(desired: Desired, found: Found, before: Made) -> list[AnySystemStep]:
    """Stop what is not wanted any more, in the order in which things depend on one another: last started first."""
    steps: list[AnySystemStep] = []
    wanted = {one.unit: one for one in desired.units}
    for unit in reversed(before.units):
        there, want = found.units.get(unit), wanted.get(unit)
        if there is None:
            continue
        if there.active and want is None:
            steps.append(StopUnit(unit=unit))
        if there.enabled and not (want and want.enabled):
            steps.append(DisableUnit(unit=unit))
    if bridge.UNIT in before.units and bridge.UNIT not in wanted:
        steps.append(RemoveBridge())  # its unit leaves it there: it is stopped for other reasons too
    return steps


def _starting(desired: Desired, found: Found, changed: set[str]) -> list[AnySystemStep]:
    steps: list[AnySystemStep] = []
    for want in desired.units:
        there = found.units.get(want.unit, FoundUnit(active=False, enabled=False))
        if want.enabled and not there.enabled:
            steps.append(EnableUnit(unit=want.unit))
        restart = want.restart_why or _named(want.restart_for, changed)
        reload = _named(want.reload_for, changed)
        if there.active and restart:
            steps.append(RestartUnit(unit=want.unit, why=restart))
        elif there.active and reload:
            steps.append(ReloadUnit(unit=want.unit, why=reload))
        elif want.active and not there.active:
            steps.append(StartUnit(unit=want.unit))
    return steps


def _named(paths: tuple[str, ...], changed: set[str]) -> str:
    found = [path for path in paths if path in changed]
    return f"{', '.join(found)} changed" if found else ""


def _by_hand(desired: Desired, found: Found, before: Made) -> tuple[str, ...]:
    """Say which files were changed by somebody else since they were written."""
    notices = []
    for file in desired.files:
        there, wrote = found.files.get(file.path), before.files.get(file.path)
        if wrote is None:
            continue
        if there is None:
            notices.append(f"{file.path} was removed by hand")
        elif digest(there.text) != wrote:
            notices.append(f"{file.path} was changed by hand")
        elif (there.mode, there.uid, there.gid) != (file.mode, 0, file.gid):
            notices.append(f"{file.path} was given other rights by hand")
    if found.firewall is not None and found.firewall_trouble:
        notices.append(found.firewall_trouble)
    return tuple(notices)
