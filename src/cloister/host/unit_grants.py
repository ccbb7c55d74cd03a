"""Which directory may be a workspace: the roots that the system's policy grants to the caller, by descriptor.

The caller sends descriptors, never paths. Where they lead is only a hint: each root is opened with the caller's
own rights and without any symbolic link, the workspace is walked to from there in the same way, and must turn out to be
the very directory that was sent. From then on only descriptors opened here are used, so nothing can be swapped.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

import msgspec

from cloister.errors import DeniedError, UnsupportedError
from cloister.host.unit_caller import Caller
from cloister.host.unit_syscalls import PATH_ONLY, acting_as, open_absolute, open_below
from cloister.plan.unit import SYSTEM_FILE, Account, Grant, System

_LARGEST_SYSTEM_FILE = 64 << 20
_DIRECTORY = PATH_ONLY | os.O_DIRECTORY


class Place(NamedTuple):
    """A granted workspace. The descriptors are our own, opened on the way from the root."""

    root: str
    """The granted root, as a path."""
    path: str
    workspace: int
    directory: int
    inside: str
    """The directory, relative to the workspace; empty for the workspace itself."""


class _Tried(NamedTuple):
    """What came of the roots of a grant, for messages."""

    usable: tuple[str, ...]
    missing: tuple[str, ...]
    linked: tuple[str, ...]


def read_system(path: str = SYSTEM_FILE) -> System:
    """Return who may start what as whom, as `cloister apply` wrote it down.

    Raises:
        UnsupportedError: there is no such file, it is not root's alone, or it is not understood.
    """
    remedy = "sudo cloister apply"
    try:
        with os.fdopen(open_absolute(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_LARGEST_SYSTEM_FILE + 1)
    except FileNotFoundError:
        raise UnsupportedError(
            "system-not-set-up", "nobody was granted anything yet", where=path, remedy=remedy
        ) from None
    except OSError as error:
        raise UnsupportedError("system-file-unsafe", f"cannot be read: {error.strerror}", where=path) from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
        raise UnsupportedError(
            "system-file-unsafe", "must be a file that only root can write", where=path, remedy=remedy
        )
    try:
        return msgspec.json.decode(data, type=System)
    except (msgspec.DecodeError, ValueError) as error:
        raise UnsupportedError(
            "system-file-unsafe", f"is not understood: {error}", where=path, remedy=remedy
        ) from error


def find_grant(system: System, caller: Caller, agent: str) -> tuple[Grant, Account]:
    """Return what lets this caller start this agent, and the account it runs as.

    Raises:
        DeniedError: nothing does. The message says no more than the caller may know.
    """
    for grant in system.grants:
        if grant.user == caller.name and grant.agent == agent:
            account = next((account for account in system.accounts if account.name == grant.account), None)
            if account is None or account.agent != agent or account.user != caller.name:
                raise UnsupportedError("grant-without-account", "a grant names an account that is not this user's",
                                       where=grant.account, remedy="sudo cloister apply")  # fmt: skip
            return grant, account
    raise DeniedError(
        "user-not-allowed", f"User {caller.name!r} is not allowed to use {agent}",
        remedy=f'the owner of this system adds [users.{caller.name}] agents = ["{agent}"] to its policy',
    )  # fmt: skip


def expand_root(root: str, home: str) -> str:
    """Return a root as an absolute path: `~` and `~/x` are the caller's home, and so is what a bare name is below.

    Raises:
        DeniedError: it goes up, or the caller has no home.
    """
    if root == "~":
        root = home
    elif root.startswith("~/"):
        root = f"{home}/{root[2:]}"
    elif not root.startswith("/"):
        root = f"{home}/{root}"
    parts = [part for part in root.split("/") if part not in {"", "."}]
    if ".." in parts or "\0" in root or not root.startswith("/"):
        raise DeniedError("root-not-absolute", "a granted root leads nowhere", where=root, remedy="sudo cloister apply")
    return "/" + "/".join(parts)


def open_place(caller: Caller, grant: Grant, workspace: int, directory: int) -> Place:
    """Return the caller's workspace, opened anew below the longest granted root that holds it.

    Raises:
        DeniedError: no root holds it, it is not the caller's, or the directory is not below it.
    """
    path = os.readlink(f"/proc/self/fd/{workspace}")
    with acting_as(caller.uid, caller.gid, caller.groups):
        opened, tried = _try_roots(_roots(caller, grant), path, workspace)
    if opened is None:
        raise _outside(path, caller, tried)
    root, found = opened
    try:
        _check_owner(found, caller, path)
        inside, below = _open_inside(caller, found, path, directory)
    except BaseException:
        os.close(found)
        raise
    return Place(root, path, found, below, inside)


def open_repository(caller: Caller, grant: Grant, sent: int) -> tuple[str, int]:
    """Return path and descriptor of the git directory of a workspace that has it elsewhere, opened as a workspace is.

    Raises:
        DeniedError: no granted root holds it, or it is not the caller's.
    """
    path = os.readlink(f"/proc/self/fd/{sent}")
    roots = _roots(caller, grant)
    with acting_as(caller.uid, caller.gid, caller.groups):
        opened, tried = _try_roots(roots, path, sent)
    if opened is None:
        raise _outside(path, caller, tried)
    if os.fstat(opened[1]).st_uid != caller.uid:
        os.close(opened[1])
        raise DeniedError("repository-not-yours", "the git directory belongs to somebody else", where=path)
    return path, opened[1]


def _roots(caller: Caller, grant: Grant) -> list[str]:
    return sorted({expand_root(root, caller.home) for root in grant.roots}, key=len, reverse=True)


def _open_inside(caller: Caller, workspace: int, path: str, directory: int) -> tuple[str, int]:
    """Walk from the workspace to the directory; return its relative name too."""
    inside_path = os.readlink(f"/proc/self/fd/{directory}")
    inside = _relative(inside_path, path)
    if inside is None:
        raise DeniedError("directory-outside", "the directory is not below the workspace", where=inside_path)
    with acting_as(caller.uid, caller.gid, caller.groups):
        return inside, _open_same(workspace, inside, directory, inside_path)


def _try_roots(roots: list[str], path: str, workspace: int) -> tuple[tuple[str, int] | None, _Tried]:
    """Walk from each root, the longest first, to the workspace."""
    usable: list[str] = []
    missing: list[str] = []
    linked: list[str] = []
    chosen: tuple[str, int] | None = None
    for root in roots:
        try:
            opened = open_absolute(root, _DIRECTORY)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            missing.append(root)
            continue
        except OSError:
            linked.append(root)
            continue
        try:
            usable.append(root)
            inside = _relative(path, root)
            if chosen is None and inside is not None:
                chosen = root, _open_same(opened, inside, workspace, path)
        finally:
            os.close(opened)
    return chosen, _Tried(tuple(usable), tuple(missing), tuple(linked))


def _open_same(base: int, name: str, sent: int, path: str) -> int:
    """Walk to a directory, which must be the one that was sent."""
    try:
        found = open_below(base, name, _DIRECTORY)
    except OSError as error:
        raise DeniedError(
            "workspace-not-reached",
            f"no way without symbolic links leads to the directory: {error.strerror}",
            where=path,
        ) from error
    if _identity(found) != _identity(sent):
        os.close(found)
        raise DeniedError("workspace-changed", "another directory stands there now", where=path)
    return found


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _relative(path: str, base: str) -> str | None:
    """Return `path` relative to `base`, both absolute and plain; None when it does not lie there."""
    if base == "/":
        return path[1:]
    if path == base:
        return ""
    return path[len(base) + 1 :] if path.startswith(base + "/") else None


def _check_owner(workspace: int, caller: Caller, path: str) -> None:
    """Refuse a workspace of somebody else: what the agent makes becomes its owner's."""
    status = os.fstat(workspace)
    shared = status.st_gid in caller.groups and status.st_mode & stat.S_IWGRP and status.st_gid >= FIRST_ORDINARY_GID
    if status.st_uid != caller.uid and not shared:
        raise DeniedError(
            "workspace-not-yours", "the workspace belongs to somebody else", where=path,
            remedy=f"chown {caller.name} it, or share it by a group of yours that may write it",
        )  # fmt: skip


FIRST_ORDINARY_GID = 1000
"""Groups below are the system's (login.defs(5), GID_MIN): some of them are as good as root."""


def _outside(path: str, caller: Caller, tried: _Tried) -> DeniedError:
    linked = "; ".join(f"{root} is or lies behind a symbolic link" for root in tried.linked)
    missing = f"Configured but missing roots: {', '.join(tried.missing)}" if tried.missing else ""
    if not tried.usable:
        return DeniedError(
            "no-project-root", f"no valid existing project roots are configured for user {caller.name!r}",
            where="; ".join(filter(None, (missing, linked))), remedy="make one of these directories",
        )  # fmt: skip
    allowed = f"Allowed roots: {', '.join(tried.usable)}"
    return DeniedError(
        "outside-roots", f"{path!r} is outside allowed project roots for user {caller.name!r}",
        where="; ".join(filter(None, (allowed, missing, linked))), remedy=f"cd {tried.usable[0]}",
    )  # fmt: skip
