"""Directories of a run under systemd, made and opened by descriptor: an agent's state, the run's own, the broker's box.

The upper levels are root's, so nobody can put something else in their place. What lies in an account's own
directory is made and opened with that account's rights: there root has no more power than the agent, and a
link that an agent left there leads nowhere.
"""

from __future__ import annotations

import contextlib
import os
import stat

from cloister.errors import StepError
from cloister.host.removal import remove_tree
from cloister.host.unit_syscalls import PATH_ONLY, acting_as, open_absolute, open_below
from cloister.plan.unit import AGENTS, PROXY_RUNTIME, RUNTIME, SKELETON, Account, UnitLaunch

UNITS = f"{RUNTIME}/units"
CARRY, MASKED_FILE, MASKED_DIRECTORY = "carry", "masked-file", "masked-directory"
_DIRECTORY = PATH_ONLY | os.O_DIRECTORY
_READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def open_project(account: Account, project: str, agents: str = AGENTS) -> int:
    """Return the directory of an account's state for a project, after making it.

    Raises:
        StepError: something else stands where a directory of the account must be.
    """
    base = open_absolute(agents, _DIRECTORY)
    try:
        _root_directory(base, account.name)
        with acting_as(0, 0):
            upper = open_below(base, account.name, _DIRECTORY)
        try:
            return _account_directory(upper, project, account)
        finally:
            os.close(upper)
    finally:
        os.close(base)


def fill_project(project: int, unit: UnitLaunch, account: Account) -> None:
    """Make an account's directories, mount points and first files below its state, with the account's own rights.

    Raises:
        StepError: a link, or something of another kind, is in the way.
    """
    wanted: list[tuple[str, str | None]] = [(name, None) for name in unit.state]
    wanted += [(name, None if kind == "directory" else "") for name, kind in unit.points]
    wanted += list(unit.seeds)
    for name, text in wanted:
        try:
            with acting_as(account.uid, account.uid):
                _make_below(project, name, text)
        except OSError as error:
            kind = "directory" if text is None else "file"
            raise StepError(
                "state-replaced", f"the agent's state has something else where a {kind} must be: {error.strerror}",
                where=f"{account.name}: {name}", remedy="as root, once its runs have ended: remove what is there",
            ) from error  # fmt: skip


def make_tops(unit: UnitLaunch, skeleton: str = SKELETON) -> None:
    """Make what is missing in the tree that is every unit's root, so that a file system of ours can be mounted there.

    Raises:
        OSError: the tree is not there, or has something else.
    """
    base = open_absolute(skeleton, _DIRECTORY)
    try:
        for mount in unit.mounts:
            parts = mount.target[1:].split("/")
            if mount.kind == "tmpfs" and len(parts) <= (2 if parts[0] in {"var", "run"} else 1):
                _make_path(base, parts, 0o755)
    finally:
        os.close(base)


def make_run_directory(run: str, units: str = UNITS) -> int:
    """Make the run's own directory, root's, with what masks are mounted from; return its descriptor.

    Raises:
        OSError: it exists, or cannot be made.
    """
    os.makedirs(units, mode=0o755, exist_ok=True)
    base = open_absolute(units, _DIRECTORY)
    try:
        os.mkdir(run, 0o700, dir_fd=base)
        made = open_below(base, run, _READ_DIRECTORY)
    finally:
        os.close(base)
    os.mkdir(CARRY, 0o755, dir_fd=made)
    os.chmod(CARRY, 0o755, dir_fd=made)  # noqa: S103  what is carried is the agent's to read
    os.mkdir(MASKED_DIRECTORY, 0, dir_fd=made)
    os.close(os.open(MASKED_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0, dir_fd=made))
    return made


def remove_run_directory(run: str, units: str = UNITS) -> None:
    """Remove the run's own directory; that it is not there is fine."""
    try:
        base = open_absolute(units, _READ_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        with contextlib.suppress(OSError):
            remove_tree(base, run)
    finally:
        os.close(base)


def open_box(run: str, proxy_uid: int, runtime: str = PROXY_RUNTIME) -> int:
    """Return the directory of a run that the system's broker has made, which must be its own.

    Raises:
        OSError: it is not there, or a link is on the way.
        StepError: it belongs to somebody else.
    """
    base = open_absolute(runtime, _DIRECTORY)
    try:
        found = open_below(base, f"runs/{run}/box", _DIRECTORY, one_file_system=True)
    finally:
        os.close(base)
    if os.fstat(found).st_uid != proxy_uid:
        os.close(found)
        raise StepError("box-not-the-brokers", "the run's directory is not the system broker's", where=runtime)
    return found


def _root_directory(base: int, name: str) -> None:
    if _make(name, base, 0o700):
        return
    status = os.stat(name, dir_fd=base, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
        raise StepError("state-replaced", "a directory of the state must be root's", where=name)


def _account_directory(base: int, name: str, account: Account) -> int:
    made = _make(name, base, 0o700)
    found = open_below(base, name, _READ_DIRECTORY)
    if made:
        os.fchown(found, account.uid, account.uid)
    status = os.fstat(found)
    if status.st_uid != account.uid:
        os.close(found)
        raise StepError("state-replaced", "a project's state belongs to somebody else", where=f"{account.name}/{name}")
    return found


def _make_below(base: int, name: str, text: str | None) -> None:
    """Make a directory (no text) or a file with a text, unless there is one, and the directories above it."""
    *above, last = name.split("/")
    holder = _make_path(base, above, 0o700, keep=True)
    try:
        if text is None:
            _make(last, holder, 0o700)
            os.close(open_below(holder, last, _DIRECTORY))
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            made = os.open(last, flags, 0o600, dir_fd=holder)
        except FileExistsError:
            if not stat.S_ISREG(os.stat(last, dir_fd=holder, follow_symlinks=False).st_mode):
                raise
            return
        with os.fdopen(made, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(holder)


def _make_path(base: int, parts: list[str], mode: int, *, keep: bool = False) -> int:
    """Make directories one below the other; with `keep` return the last one's descriptor."""
    holder = open_below(base, "", _DIRECTORY)
    for part in parts:
        try:
            _make(part, holder, mode)
            below = open_below(holder, part, _DIRECTORY)
        finally:
            os.close(holder)
        holder = below
    if keep:
        return holder
    os.close(holder)
    return -1


def _make(name: str, base: int, mode: int) -> bool:
    """Make one directory; return False where the name is taken."""
    try:
        os.mkdir(name, mode, dir_fd=base)
    except FileExistsError:
        return False
    return True
