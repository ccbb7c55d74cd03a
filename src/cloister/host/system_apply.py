"""Carry out a `SystemPlan`: written down before its first step, undone when one fails, finished by the next if killed.

`/var/lib/cloister/setup.json` says what in this system is Cloister's, which accounts were ever given out, and, while
a plan is under way, the plan. Files are replaced whole, by rename. Every place it writes to is root's on all levels,
which is looked at before each step; it follows no link. What shall be done was decided before: nothing is here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from cloister.errors import RetryError, StepError
from cloister.host import bridge, firewall, programs, removal
from cloister.plan.firewall import FILE
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
    RemoveAccounts,
    RemoveBridge,
    RemoveDirectory,
    RemoveFile,
    RemoveLink,
    RemoveTree,
    RestartUnit,
    StartUnit,
    StopUnit,
    SystemPlan,
    UnitStep,
    UnloadFirewall,
    undo,
)
from cloister.plan.system_diff import Made, both
from cloister.plan.unit import DAEMON_USERS, STATE, Account

RECORD = f"{STATE}/setup.json"
PARTIAL = ".cloister-new"
_TIMEOUT_S = 120.0
_MAX_BYTES = 16 << 20
_ENVIRONMENT = {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
_UNIT_VERBS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (EnableUnit, ("enable", "--quiet")),
    (DisableUnit, ("disable", "--quiet")),
    (StartUnit, ("start",)),
    (StopUnit, ("stop",)),
    (RestartUnit, ("try-restart",)),
    (ReloadUnit, ("reload-or-try-restart",)),
)

_OnDisk = InstallFile | RemoveFile | MakeDirectory | MakeLink | RemoveLink | RemoveTree | EditLines
Command = Callable[[list[str], bytes], str]
"""Runs a program of the system with words and input; returns what it complains about, or nothing."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What Cloister knows of its own installation."""

    version: int = 1
    made: Made = Made()
    accounts: tuple[Account, ...] = ()
    """Every account that was ever given out: a number is not given to somebody else while it stands here."""
    unfinished: tuple[AnySystemStep, ...] = ()
    """The plan that is being applied; left by one that was killed."""


def read_record(root: str = "") -> Record:
    """Return what is written down; an empty record on a system without Cloister.

    Raises:
        StepError: `record-unreadable`.
    """
    path = root + RECORD
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise StepError("record-unreadable", f"cannot read what is installed: {error.strerror}", where=path) from error
    with os.fdopen(descriptor, "rb") as file:
        try:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=Record)
        except msgspec.DecodeError as error:
            message = f"what is written down about this installation is broken: {error}"
            raise StepError("record-unreadable", message, where=path, remedy=f"restore {path}") from error


class Applier:
    """Applies plans to this system; `root` and `command` are others in tests."""

    def __init__(
        self, *, root: str = "", command: Command | None = None, before_step: Callable[[int], None] | None = None
    ) -> None:
        """Change nothing yet; `before_step` is told the number of each step before it is done."""
        self._root = root
        self._command = command or _run
        self._before_step = before_step or (lambda _: None)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who changes this installation.

        Raises:
            RetryError: `setup-in-use`.
            StepError: there is no place for records.
        """
        # The directory above ours is there before us and after. Ours is locked by the packet filter.
        directory = os.path.dirname(self._root + STATE)
        with _in_words(directory):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            message = "another setup, apply or uninstall is at work"
            raise RetryError("setup-in-use", message, where=RECORD, remedy="try again when it has ended") from None
        finally:
            os.close(descriptor)

    def apply(self, plan: SystemPlan, record: Record, after: Record | None) -> None:
        """Do every step, or none.

        Args:
            plan: what to do.
            record: what was read before.
            after: what is to be written down when all is done; None: the record goes as well.

        Raises:
            StepError: `step-failed`; what was done before is undone. `undo-failed`: not all of it.
        """
        if not plan.steps and after == record:
            return
        under_way = Record(
            made=both(record.made, after.made) if after else record.made,
            accounts=after.accounts if after else record.accounts,
            unfinished=(*record.unfinished, *plan.steps),
        )
        with _in_words(STATE):
            os.makedirs(self._root + STATE, mode=0o755, exist_ok=True)
        self._write(under_way)
        self._sweep(record.unfinished)
        done: list[AnySystemStep] = []
        try:
            for number, step in enumerate(plan.steps):
                self._before_step(number)
                done.append(step)  # also the one that fails: it may have got half way
                self.do(step)
        except (StepError, KeyboardInterrupt) as error:
            self._undo(done, record, error)
            raise
        if after is not None:
            self._write(after)
        else:
            self._forget()

    def do(self, step: AnySystemStep) -> None:
        """Do one step. Each may be done twice, and finds then that nothing is left to do.

        Raises:
            StepError: the host refused it.
        """
        if isinstance(step, UnitStep | ReloadManager):
            self._tell_manager(step)
        elif isinstance(step, LoadFirewall | UnloadFirewall | RemoveBridge):
            self._load(step)
        elif isinstance(step, MakeAccounts):
            self._make_accounts(step)
        elif isinstance(step, RemoveAccounts):
            self._remove_accounts(step)
        elif isinstance(step, RemoveDirectory):
            with contextlib.suppress(OSError):  # not empty: what is in it is not ours
                os.rmdir(self._place(step.path))
        else:
            with _in_words(step.path):
                self._change(step, self._place(step.path))

    def _change(self, step: _OnDisk, place: str) -> None:
        if isinstance(step, InstallFile):
            self._replace(place, step.text.encode(), step.mode, step.uid, step.gid)
        elif isinstance(step, MakeDirectory):
            self._make_directory(step, place)
        elif isinstance(step, MakeLink):
            with contextlib.suppress(FileExistsError):
                os.symlink(step.target, place)
        elif isinstance(step, EditLines):
            self._edit(step, place)
        else:
            with contextlib.suppress(FileNotFoundError):
                (removal.remove if isinstance(step, RemoveTree) else os.unlink)(place)

    def _undo(self, done: list[AnySystemStep], record: Record, error: BaseException) -> None:
        """Take back what was done; when that fails too, the record goes on naming all of it."""
        failed = []
        for step in undo(done):
            try:
                self.do(step)
            except StepError as another:
                failed.append(f"{step.describe()}: {another.message}")
        if failed:
            message = f"{error}; and not all could be undone: {'; '.join(failed)}"
            raise StepError("undo-failed", message, remedy="mend the cause, then: cloister apply") from error
        if record == Record():
            self._forget()
        else:
            self._write(record)

    def _forget(self) -> None:
        """Leave no record, and no directory for it."""
        for remove, place in ((os.unlink, RECORD), (os.rmdir, STATE)):
            with contextlib.suppress(OSError):
                remove(self._root + place)

    def _write(self, record: Record) -> None:
        text = msgspec.json.format(msgspec.json.encode(record), indent=1).decode() + "\n"
        with _in_words(RECORD):
            self._replace(self._root + RECORD, text.encode(), 0o600, 0, 0)

    def _sweep(self, unfinished: tuple[AnySystemStep, ...]) -> None:
        """Remove what a killed application had half written."""
        for step in unfinished:
            if isinstance(step, InstallFile | EditLines):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._place(step.path)}{PARTIAL}")

    def _place(self, path: str) -> str:
        """Return where a step acts, after a look at who could change the directories on the way.

        Raises:
            StepError: `place-changeable`.
        """
        place = Path(self._root + path)
        owner = os.stat("/").st_uid
        for parent in place.parents:
            if self._root and not str(parent).startswith(f"{self._root}/"):
                break
            if os.path.lexists(parent) and (parent.is_symlink() or not programs.trusted(parent, owner)):
                message = "others than root could change a directory that Cloister writes to"
                remedy = f"chown root {parent}; chmod go-w {parent}"
                raise StepError("place-changeable", message, where=str(parent), remedy=remedy)
        return str(place)

    def _replace(self, place: str, data: bytes, mode: int, uid: int, gid: int) -> None:
        partial = f"{place}{PARTIAL}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            self._own(file.fileno(), uid, gid)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(partial, place)
        directory = os.open(os.path.dirname(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _own(self, descriptor: int, uid: int, gid: int) -> None:
        if not self._root:
            os.fchown(descriptor, uid, gid)

    def _make_directory(self, step: MakeDirectory, place: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._own(descriptor, step.uid, step.gid)
            os.fchmod(descriptor, step.mode)
        finally:
            os.close(descriptor)

    def _edit(self, step: EditLines, place: str) -> None:
        try:
            info = os.lstat(place)
        except FileNotFoundError:
            return  # the list is gone, and whoever removed it decided so
        if not stat.S_ISREG(info.st_mode):
            raise StepError("not-ours", "it is not a regular file", where=step.path)
        lines = Path(place).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        kept = [line for line in lines if line not in step.remove]
        text = "".join(f"{line}\n" for line in (*kept, *(name for name in step.add if name not in kept)))
        data = text.encode("utf-8", "surrogateescape")
        self._replace(place, data, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid)

    def _make_accounts(self, step: MakeAccounts) -> None:
        """Make users by systemd-sysusers, and look at what came of it.

        systemd-sysusers takes another number, without a word, where ours is not free.
        """
        lines = [f'u {name} - "{DAEMON_USERS.get(name, "Cloister")}" / /usr/sbin/nologin' for name in step.daemons]
        lines += [f'u {one.name} {one.uid} "Cloister" /nonexistent /usr/sbin/nologin' for one in step.accounts]
        complaint = self._command(["systemd-sysusers", "-"], ("\n".join(lines) + "\n").encode())
        if complaint:
            raise StepError("step-failed", f"users were not made: {complaint}", where="systemd-sysusers")
        if self._root:
            return
        numbers = dict(_passwd())
        for account in step.accounts:
            if numbers.get(account.name) != account.uid:
                message = f"{account.name} has the number {numbers.get(account.name)}, not {account.uid}"
                raise StepError("step-failed", message, where="/etc/passwd", remedy=f"userdel {account.name}")

    def _remove_accounts(self, step: RemoveAccounts) -> None:
        names = dict(_passwd()) if not self._root else {}
        for name in (*(account.name for account in step.accounts), *step.daemons):
            if name not in names and not self._root:
                continue
            complaint = self._command(["userdel", name], b"")
            if complaint and not self._root and name in dict(_passwd()):
                raise StepError("step-failed", f"the user {name} was not removed: {complaint}", where="userdel")

    def _load(self, step: LoadFirewall | UnloadFirewall | RemoveBridge) -> None:
        with _in_words(FILE):
            if isinstance(step, RemoveBridge):
                bridge.remove()
            elif isinstance(step, LoadFirewall):
                firewall.install(step.text)
            else:
                firewall.remove()

    def _tell_manager(self, step: UnitStep | ReloadManager) -> None:
        words, what = ["daemon-reload"], "systemd"
        if isinstance(step, UnitStep):
            words = [*next(words for kind, words in _UNIT_VERBS if isinstance(step, kind)), "--", step.unit]
            what = step.unit
        complaint = self._command(["systemctl", "--no-ask-password", *words], b"")
        if complaint:
            remedy = f"journalctl -u {what}" if what != "systemd" else "systemctl status"
            raise StepError("step-failed", f"systemctl {words[0]}: {complaint}", where=what, remedy=remedy)


def _passwd() -> Iterator[tuple[str, int]]:
    for line in Path("/etc/passwd").read_text(encoding="utf-8", errors="replace").splitlines():
        parts = line.split(":")
        if len(parts) > 2 and parts[2].isdecimal():  # noqa: PLR2004
            yield parts[0], int(parts[2])


def _run(words: list[str], data: bytes) -> str:
    """Run a program that the system's owner installed; return what it says when it fails."""
    path = programs.find(words[0], "").path
    if not path:
        return f"{words[0]} is not installed"
    # PRIVILEGE: root's own; words are names that the policy's checks let through, and paths of ours.
    try:
        done = subprocess.run(
            [path, *words[1:]], input=data, env=_ENVIRONMENT, cwd="/", capture_output=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    text = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
    return " / ".join(text.splitlines()[-3:]) or f"it ended with {done.returncode}"


@contextlib.contextmanager
def _in_words(path: str) -> Iterator[None]:
    """Turn what the kernel refuses into our error."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        raise StepError("step-failed", f"the host refused: {error.strerror}", where=error.filename or path) from error
