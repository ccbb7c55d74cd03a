"""A workspace whose changes are kept aside: an overlay that root mounts for an account, out of what is the user's.

The workspace is the lower layer and a directory of the user's the upper one, both as idmapped mounts, so what the
account writes belongs to the user on disk and nobody else gets there. The overlay is made by a process of its own
whose rights end with the account's: in a user namespace that knows the account and no root, since overlayfs
works with the rights of who mounted it (Documentation/filesystems/overlayfs.rst, "Permission model"). Layers are named
by descriptors. It is mounted with `userxattr`: what it writes down, the user can read. Needs Linux 5.19.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import NamedTuple

from cloister.errors import DeniedError, UnsupportedError
from cloister.host.unit_caller import Caller
from cloister.host.unit_syscalls import (
    NODEV,
    NOSUID,
    PATH_ONLY,
    READ_ONLY,
    acting_as,
    attach_mount,
    become_namespaces_user,
    clone_mount,
    leave_mount_namespace,
    new_overlay,
    new_tmpfs,
    open_absolute,
    open_below,
    set_mount,
)
from cloister.plan.unit import COPY_UPPER, COPY_WORK, SKELETON

_DIRECTORY = PATH_ONLY | os.O_DIRECTORY
_LAYER_PLACES = ("lower", "copy")
_OTHERS = 0o077
_FLAGS = NOSUID | NODEV


class Namespace(NamedTuple):
    """A user namespace for ids of mounts, and who in it the account is."""

    descriptor: int
    uid: int
    gid: int


def open_copy(sent: int, caller: Caller) -> int:
    """Return the caller's directory for changes, opened anew in this mount namespace with the caller's own rights.

    Raises:
        DeniedError: it, or one of the two directories that it must have, is not the caller's alone.
    """
    try:
        with acting_as(caller.uid, caller.gid, caller.groups):
            copy = open_absolute(os.readlink(f"/proc/self/fd/{sent}"), _DIRECTORY)
            try:
                _check_own(copy, caller, sent)
                for name in (COPY_UPPER, COPY_WORK):
                    below = open_below(copy, name, _DIRECTORY, one_file_system=True)
                    try:
                        _check_own(below, caller)
                    finally:
                        os.close(below)
            except BaseException:
                os.close(copy)
                raise
    except OSError as error:
        raise _not_own(f"cannot be opened: {error.strerror}") from error
    return copy


def _check_own(found: int, caller: Caller, sent: int = -1) -> None:
    status = os.fstat(found)
    if sent >= 0 and not os.path.samestat(status, os.fstat(sent)):
        raise _not_own("was replaced")
    if status.st_uid != caller.uid or status.st_mode & _OTHERS:
        raise _not_own("must be yours alone, with mode 0700")


def _not_own(why: str) -> DeniedError:
    return DeniedError("copy-not-yours", f"the directory for the changes of the run {why}", remedy="try again")


def make_overlay(workspace: int, copy: int, mapped: Namespace) -> int:
    """Return a detached mount: `workspace` as it is, with what is written kept below `copy`.

    Raises:
        UnsupportedError: the kernel or one of the file systems cannot do that.
        OSError: a process could not be made.
    """
    layers: list[int] = []
    try:
        for source, flags in ((workspace, _FLAGS | READ_ONLY), (copy, _FLAGS)):
            layers.append(clone_mount(source))
            set_mount(layers[-1], flags, mapped.descriptor)
        return _mounted_by_helper(layers, mapped)
    except OSError as error:
        raise not_possible(str(error.strerror)) from error
    finally:
        for layer in layers:
            os.close(layer)


def not_possible(why: str) -> UnsupportedError:
    """Return the refusal of a workspace whose changes cannot be kept aside."""
    return UnsupportedError(
        "workspace-overlay", f"changes of this workspace cannot be kept aside: {why}",
        remedy="workspace and ~/.local/state on file systems with idmapped mounts and user attributes (ext4, xfs, "
        'btrfs; Linux 5.19), or workspace.mode = "direct"',
    )  # fmt: skip


def _mounted_by_helper(layers: list[int], mapped: Namespace) -> int:
    """Have a child make the overlay, and return the descriptor that it sends.

    Raises:
        OSError: it could not; with the kernel's words.
    """
    hear, say = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with hear, say:
        child = os.fork()
        if child == 0:
            _be_helper(say, layers, mapped)
        say.close()
        try:
            data, found, _, _ = socket.recv_fds(hear, 1 << 12, 1)
        finally:
            os.waitpid(child, 0)
    if not found:
        raise OSError(0, data.decode("utf-8", "replace") or "the helper died")
    os.set_inheritable(found[0], False)
    return found[0]


def _be_helper(say: socket.socket, layers: list[int], mapped: Namespace) -> None:
    """Be the child. Never returns."""
    try:
        socket.send_fds(say, [b"."], [_mount(layers, mapped)])
    except OSError as error:
        with contextlib.suppress(OSError):
            say.sendall(str(error.strerror).encode())
    finally:
        os._exit(0)


def _mount(layers: list[int], mapped: Namespace) -> int:
    """Put the layers where only this process sees them, become the account, and make the overlay of them."""
    leave_mount_namespace()
    attach_mount(new_tmpfs({"mode": "0755"}, _FLAGS), open_absolute(SKELETON, _DIRECTORY))
    for name, layer in zip(_LAYER_PLACES, layers, strict=True):
        os.mkdir(f"{SKELETON}/{name}", 0o755)
        os.chmod(f"{SKELETON}/{name}", 0o755)  # noqa: S103  whatever the umask is; nobody else is here
        attach_mount(layer, open_absolute(f"{SKELETON}/{name}", _DIRECTORY))
    become_namespaces_user(mapped.descriptor, mapped.uid, mapped.gid)
    lower, copy = (open_absolute(f"{SKELETON}/{name}", _DIRECTORY) for name in _LAYER_PLACES)
    # Opened here, without following a link: below the copy names are the user's to change.
    upper, work = (open_below(copy, name, _DIRECTORY, one_file_system=True) for name in (COPY_UPPER, COPY_WORK))
    return new_overlay(lower, upper, work, _FLAGS)
