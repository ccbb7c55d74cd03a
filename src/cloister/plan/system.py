"""What is done to install Cloister into a system and to keep it as the policy says: the closed union of small steps.

Each step says one thing, describes itself in a line, and knows its inverse: what was there before stands in it. It
holds no secret. What must change is decided by `plan/system_diff.py`; doing it is for `host/system_apply.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cloister.plan.bridge import BRIDGE, TABLE
from cloister.plan.unit import Account


class SystemStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="step"):
    """What all steps share."""


class Owned(SystemStep, frozen=True, kw_only=True):
    """What things on disk share: whose they are, and who may do what."""

    path: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


class InstallFile(Owned, frozen=True, kw_only=True, tag="install-file"):
    """Put a file in place, whole, with owner and mode."""

    text: str
    before: str | None = None
    """What was there; None: nothing."""
    before_mode: int = 0o644
    before_uid: int = 0
    before_gid: int = 0

    def describe(self) -> str:
        """Return one line for people."""
        verb = "write" if self.before is None else "change"
        return f"{verb} {self.path} ({_rights(self)})"

    def inverse(self) -> RemoveFile | InstallFile:
        """Return what takes it back."""
        if self.before is None:
            return RemoveFile(path=self.path, mode=self.mode, uid=self.uid, gid=self.gid, before=self.text)
        return InstallFile(
            path=self.path, mode=self.before_mode, uid=self.before_uid, gid=self.before_gid, text=self.before,
            before=self.text, before_mode=self.mode, before_uid=self.uid, before_gid=self.gid,
        )  # fmt: skip


class RemoveFile(Owned, frozen=True, kw_only=True, tag="remove-file"):
    """Remove a file of ours."""

    before: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"remove {self.path}"

    def inverse(self) -> InstallFile:
        """Return what takes it back."""
        return InstallFile(path=self.path, text=self.before, mode=self.mode, uid=self.uid, gid=self.gid)


class MakeDirectory(Owned, frozen=True, tag="make-directory"):
    """Make a directory, or give one that is there its owner and mode."""

    mode: int = 0o755
    before: tuple[int, int, int] | None = None
    """Mode, uid and gid of one that is there; None: none is."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"{'make' if self.before is None else 'set the rights of'} directory {self.path} ({_rights(self)})"

    def inverse(self) -> RemoveDirectory | MakeDirectory:
        """Return what takes it back."""
        if self.before is None:
            return RemoveDirectory(path=self.path, mode=self.mode, uid=self.uid, gid=self.gid)
        mode, uid, gid = self.before
        return MakeDirectory(path=self.path, mode=mode, uid=uid, gid=gid, before=(self.mode, self.uid, self.gid))


class RemoveDirectory(Owned, frozen=True, tag="remove-directory"):
    """Remove a directory where it is empty; one that is not stays."""

    mode: int = 0o755

    def describe(self) -> str:
        """Return one line for people."""
        return f"remove directory {self.path}, if it is empty"

    def inverse(self) -> MakeDirectory:
        """Return what takes it back."""
        return MakeDirectory(path=self.path, mode=self.mode, uid=self.uid, gid=self.gid)


class RemoveTree(SystemStep, frozen=True, tag="remove-tree"):
    """Delete a directory and all that is in it. Nothing takes it back, so it comes last."""

    path: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"DELETE {self.path} and all that is in it, for ever"

    def inverse(self) -> None:
        """Return nothing: it cannot be undone."""


class MakeLink(SystemStep, frozen=True, tag="make-link"):
    """Make a symbolic link."""

    path: str
    target: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"link {self.path} to {self.target}"

    def inverse(self) -> RemoveLink:
        """Return what takes it back."""
        return RemoveLink(path=self.path, target=self.target)


class RemoveLink(SystemStep, frozen=True, tag="remove-link"):
    """Remove a symbolic link of ours."""

    path: str
    target: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"remove link {self.path}"

    def inverse(self) -> MakeLink:
        """Return what takes it back."""
        return MakeLink(path=self.path, target=self.target)


class MakeAccounts(SystemStep, frozen=True, tag="make-accounts"):
    """Make system users, each with a group of its number: no login, no home, no subordinate ids."""

    accounts: tuple[Account, ...] = ()
    daemons: tuple[str, ...] = ()
    """Users of our own processes, whose numbers are the system's choice."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"make {_users(self)}"

    def inverse(self) -> RemoveAccounts:
        """Return what takes it back."""
        return RemoveAccounts(accounts=self.accounts, daemons=self.daemons)


class RemoveAccounts(SystemStep, frozen=True, tag="remove-accounts"):
    """Remove system users of ours and their groups."""

    accounts: tuple[Account, ...] = ()
    daemons: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line for people."""
        return f"remove {_users(self)}"

    def inverse(self) -> MakeAccounts:
        """Return what takes it back."""
        return MakeAccounts(accounts=self.accounts, daemons=self.daemons)


class EditLines(SystemStep, frozen=True, tag="edit-lines"):
    """Add and remove whole lines of a file that is not ours, such as /etc/cron.deny."""

    path: str
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line for people."""
        done = [f"add {', '.join(self.add)} to"] * bool(self.add) + [f"take {', '.join(self.remove)} out of"] * bool(
            self.remove
        )
        return f"{' and '.join(done)} {self.path}"

    def inverse(self) -> EditLines:
        """Return what takes it back."""
        return EditLines(path=self.path, add=self.remove, remove=self.add)


class LoadFirewall(SystemStep, frozen=True, tag="load-firewall"):
    """Check the packet filter of our accounts, put it where it is loaded from at boot, and load it."""

    text: str
    before: str | None = None

    def describe(self) -> str:
        """Return one line for people."""
        return "load the packet filter of the accounts"

    def inverse(self) -> LoadFirewall | UnloadFirewall:
        """Return what takes it back."""
        if self.before is None:
            return UnloadFirewall(before=self.text)
        return LoadFirewall(text=self.before, before=self.text)


class UnloadFirewall(SystemStep, frozen=True, tag="unload-firewall"):
    """Take our packet filter away, from the kernel and from the disk."""

    before: str

    def describe(self) -> str:
        """Return one line for people."""
        return "take the packet filter of the accounts away (table inet cloister)"

    def inverse(self) -> LoadFirewall:
        """Return what takes it back."""
        return LoadFirewall(text=self.before)


class RemoveBridge(SystemStep, frozen=True, tag="remove-bridge"):
    """Take the bridge of microVMs away, with the taps on it and its packet filter."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"take {BRIDGE} away, with all that is on it, and its packet filter (tables {TABLE})"

    def inverse(self) -> None:
        """Return nothing: its unit makes it again, when that is started again."""


class UnitStep(SystemStep, frozen=True):
    """What steps about units share."""

    unit: str


class EnableUnit(UnitStep, frozen=True, tag="enable-unit"):
    """Have a unit started with the system."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"enable {self.unit}"

    def inverse(self) -> DisableUnit:
        """Return what takes it back."""
        return DisableUnit(unit=self.unit)


class DisableUnit(UnitStep, frozen=True, tag="disable-unit"):
    """Have a unit not started with the system any more."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"disable {self.unit}"

    def inverse(self) -> EnableUnit:
        """Return what takes it back."""
        return EnableUnit(unit=self.unit)


class StartUnit(UnitStep, frozen=True, tag="start-unit"):
    """Start a unit and wait until it is up."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"start {self.unit}"

    def inverse(self) -> StopUnit:
        """Return what takes it back."""
        return StopUnit(unit=self.unit)


class StopUnit(UnitStep, frozen=True, tag="stop-unit"):
    """Stop a unit and wait until it is gone."""

    why: str = ""
    transient: bool = False
    """A run: once stopped it is gone, and is not started again."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"stop {self.unit}" + (f": {self.why}" if self.why else "")

    def inverse(self) -> StartUnit | None:
        """Return what takes it back."""
        return None if self.transient else StartUnit(unit=self.unit)


class RestartUnit(UnitStep, frozen=True, tag="restart-unit"):
    """Restart a unit that runs, since what it was started from has changed."""

    why: str = ""

    def describe(self) -> str:
        """Return one line for people."""
        return f"restart {self.unit}" + (f": {self.why}" if self.why else "")

    def inverse(self) -> RestartUnit:
        """Return what takes it back: with the old files in place it is as it was."""
        return self


class ReloadUnit(UnitStep, frozen=True, tag="reload-unit"):
    """Have a unit that runs read its configuration again."""

    why: str = ""

    def describe(self) -> str:
        """Return one line for people."""
        return f"reload {self.unit}" + (f": {self.why}" if self.why else "")

    def inverse(self) -> ReloadUnit:
        """Return what takes it back: with the old files in place it is as it was."""
        return self


class ReloadManager(SystemStep, frozen=True, tag="reload-manager"):
    """Have systemd read unit files again."""

    def describe(self) -> str:
        """Return one line for people."""
        return "have systemd read its unit files again"

    def inverse(self) -> ReloadManager:
        """Return itself."""
        return self


AnySystemStep = (
    InstallFile
    | RemoveFile
    | MakeDirectory
    | RemoveDirectory
    | RemoveTree
    | MakeLink
    | RemoveLink
    | MakeAccounts
    | RemoveAccounts
    | EditLines
    | LoadFirewall
    | UnloadFirewall
    | RemoveBridge
    | EnableUnit
    | DisableUnit
    | StartUnit
    | StopUnit
    | RestartUnit
    | ReloadUnit
    | ReloadManager
)
_THINGS = (
    InstallFile, RemoveFile, MakeDirectory, RemoveDirectory, MakeLink, RemoveLink, MakeAccounts, RemoveAccounts,
    EditLines, LoadFirewall, UnloadFirewall, RemoveBridge,
)  # fmt: skip
_BEGUN = (StartUnit, EnableUnit)
_ENDED = (StopUnit, DisableUnit, RestartUnit, ReloadUnit)


class SystemPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that will be done to a system, in order. Empty: the system is as declared."""

    steps: tuple[AnySystemStep, ...] = ()
    notices: tuple[str, ...] = ()
    """What is kept, or cannot be done here, in words."""


def undo(done: Sequence[AnySystemStep]) -> tuple[AnySystemStep, ...]:
    """Return the steps that take back what was done, in the order in which they must run.

    What was begun ends first, then things become what they were, then systemd reads them, and only then runs again
    what ran before: a unit restarted earlier would come up from the new file.
    """
    back = list(reversed(done))
    ending = [step.inverse() for step in back if isinstance(step, _BEGUN)]
    things = [step.inverse() for step in back if isinstance(step, _THINGS)]
    reload = [ReloadManager()] if any(isinstance(step, InstallFile | RemoveFile) for step in done) else []
    again = [step.inverse() for step in back if isinstance(step, _ENDED)]
    return tuple(step for step in (*ending, *things, *reload, *again) if step is not None)


def _rights(step: Owned) -> str:
    owner = "root" if step.uid == step.gid == 0 else f"{step.uid}:{step.gid}"
    return f"{owner}, {step.mode:04o}"


def _users(step: MakeAccounts | RemoveAccounts) -> str:
    names = [f"{account.name} ({account.uid})" for account in step.accounts]
    names = [*step.daemons, *names]
    few = names if len(names) <= 8 else [*names[:8], f"{len(names) - 8} more"]  # noqa: PLR2004  # what fits a line or two
    return f"{'user' if len(names) == 1 else f'{len(names)} users'} {', '.join(few)}"
