"""The system calls that root's part of a run under systemd is made of, each as one function on descriptors.

Python has none of them: openat2(2), open_tree(2), mount_setattr(2), fsopen(2), fsmount(2), move_mount(2), and
unshare(2) before 3.12. Numbers are those of asm-generic/unistd.h, equal on every architecture since 5.1.
Nothing is decided here, and no path is ever followed through a symbolic link.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 437, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_BOTH_EMPTY = 0x4 | 0x40
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8
_CLONE_NEWUSER, _CLONE_NEWNS, _CLONE_NEWUTS = 0x10000000, 0x00020000, 0x04000000
READ_ONLY, NOSUID, NODEV, NOEXEC, _IDMAP = 1, 2, 4, 8, 0x00100000
_TRIES = 16
_LONGEST_WORD = 1 << 12
_STATX_SIZE, _STATX_MNT_ID, _STATX_MNT_ID_OFFSET = 256, 0x1000, 144
PATH_ONLY = os.O_PATH | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def open_below(base: int, name: str, flags: int = PATH_ONLY, mode: int = 0, *, one_file_system: bool = False) -> int:
    """Open `name` below the directory `base`, without leaving it and without any link; empty means the base itself.

    Raises:
        OSError: ELOOP where a component is a link, EXDEV where the path would leave (or with `one_file_system`
            meets a mount), ENOENT, EACCES.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    return _openat2(base, name or ".", flags, mode, resolve | (_RESOLVE_NO_XDEV if one_file_system else 0))


def open_absolute(path: str, flags: int = PATH_ONLY) -> int:
    """Open an absolute path that has no link in any component.

    Raises:
        OSError: ELOOP where one is a link, ENOENT, EACCES, ENOTDIR.
    """
    return _openat2(_AT_FDCWD, path, flags, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)


def clone_mount(source: int) -> int:
    """Return a detached mount of what the descriptor is: that alone, without the mounts below it."""
    return _call(_OPEN_TREE, source, b"", ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH))


def set_mount(mount: int, flags: int, userns: int = -1, *, writable: bool = False) -> None:
    """Make a detached mount private, with these flags, and with the ids of a user namespace where one is given.

    `writable` takes the clone's own read-only flag away; the mount it was cloned from keeps it.

    Private first of all: a clone of a shared mount would hand on to the host what is mounted on it
    (mount_namespaces(7), "peer group").
    """
    given = flags | (_IDMAP if userns >= 0 else 0)
    wanted = _MountAttributes(
        set=given, clear=READ_ONLY if writable else 0, propagation=_MS_PRIVATE, userns=max(userns, 0)
    )
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    _call(_MOUNT_SETATTR, mount, b"", ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE), ctypes.byref(wanted), size)


def new_tmpfs(options: dict[str, str], flags: int) -> int:
    """Return a detached mount of a fresh tmpfs (tmpfs(5) has the options)."""
    return _new_file_system(b"tmpfs", options, flags)


def new_terminals(flags: int) -> int:
    """Return a detached mount of a fresh instance of devpts, with rights as systemd gives them."""
    return _new_file_system(b"devpts", {"mode": "0620", "gid": "5", "ptmxmode": "0666"}, flags)


def new_overlay(lower: int, upper: int, work: int, flags: int) -> int:
    """Return a detached mount of an overlay; its layers are directories on mounts of the caller's own namespace."""
    layers = {"lowerdir": lower, "upperdir": upper, "workdir": work}
    options = {name: f"/proc/self/fd/{descriptor}" for name, descriptor in layers.items()}
    # Features whose bookkeeping a user could forge are off with userxattr; these two need rights that nobody here has.
    return _new_file_system(b"overlay", {**options, "index": "off", "xino": "off"}, flags, switches=("userxattr",))


def _new_file_system(kind: bytes, options: dict[str, str], flags: int, switches: tuple[str, ...] = ()) -> int:
    context = _call(_FSOPEN, kind, ctypes.c_uint(1))
    try:
        for name, value in options.items():
            _call(_FSCONFIG, context, ctypes.c_uint(_FSCONFIG_SET_STRING), name.encode(), value.encode(), 0)
        for name in switches:
            _call(_FSCONFIG, context, ctypes.c_uint(_FSCONFIG_SET_FLAG), name.encode(), None, 0)
        _call(_FSCONFIG, context, ctypes.c_uint(_FSCONFIG_CMD_CREATE), None, None, 0)
        return _call(_FSMOUNT, context, ctypes.c_uint(1), ctypes.c_uint(flags))
    except OSError as error:
        raise OSError(error.errno, _told(context) or error.strerror) from error
    finally:
        os.close(context)


def _told(context: int) -> str:
    """Return what the kernel has to say of a file system that it does not make; often nothing."""
    try:
        return os.read(context, _LONGEST_WORD).decode("utf-8", "replace").removeprefix("e ").strip()
    except OSError:
        return ""


def attach_mount(mount: int, place: int) -> None:
    """Mount a detached mount on what the descriptor `place` is."""
    _call(_MOVE_MOUNT, mount, b"", place, b"", ctypes.c_uint(_MOVE_MOUNT_BOTH_EMPTY))


def enter_mount_namespace(namespace: int) -> None:
    """Become part of a mount namespace; working directory and root become its root (setns(2))."""
    if _libc.setns(namespace, _CLONE_NEWNS) != 0:
        raise _error()


def leave_mount_namespace() -> None:
    """Become the only process of a new mount namespace, from which nothing is handed on (unshare(2))."""
    if _libc.unshare(_CLONE_NEWNS) != 0 or _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None):
        raise _error()


def become_namespaces_user(namespace: int, uid: int, gid: int) -> None:
    """Become a user of a user namespace, with powers over nothing but what it maps, in a mount namespace of its own.

    `uid` and `gid` are numbers inside. Root of the host has no number there, so changing ids takes no powers away.
    """
    if _libc.setns(namespace, _CLONE_NEWUSER) != 0 or _libc.unshare(_CLONE_NEWNS) != 0:
        raise _error()
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def name_host(namespace: int, name: str) -> None:
    """Give a UTS namespace that is not the host's own a host name; the caller becomes part of it (setns(2))."""
    if _libc.setns(namespace, _CLONE_NEWUTS) != 0:
        raise _error()
    socket.sethostname(name)


def mount_id(descriptor: int) -> int:
    """Return the id of the mount on which a descriptor is; it stays the same when the mount is moved (statx(2)).

    Raises:
        OSError: the kernel does not say (before Linux 5.8).
    """
    found = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(descriptor, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_MNT_ID), found) != 0:
        raise _error()
    mask, number = struct.unpack_from("<I", found)[0], struct.unpack_from("<Q", found, _STATX_MNT_ID_OFFSET)[0]
    if not mask & _STATX_MNT_ID:
        raise OSError(errno.ENOTSUP, "the kernel does not say on which mount a descriptor is")
    return int(number)


def id_namespace(uid_map: str, gid_map: str) -> int:
    """Return a descriptor of a user namespace with these maps, in which no process lives: for idmapped mounts."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _hold_namespace(ready, go)
    try:
        os.close(ready[1])
        if os.read(ready[0], 1) != b"y":
            raise OSError("no user namespace could be made")
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(text)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready[0], *go):
            os.close(descriptor)
        os.waitpid(pid, 0)


def _hold_namespace(ready: tuple[int, int], go: tuple[int, int]) -> None:
    """Be the namespace's only process until the parent has its descriptor."""
    try:
        os.close(go[1])
        os.write(ready[1], b"y" if _libc.unshare(_CLONE_NEWUSER) == 0 else b"n")
        os.read(go[0], 1)
    finally:
        os._exit(0)


@contextmanager
def acting_as(uid: int, gid: int, groups: tuple[int, ...] = ()) -> Iterator[None]:
    """Let the kernel judge by another user's rights: effective ids and groups, for the length of the block.

    For a process with one thread. Going from 0 to another effective uid takes the effective capabilities away;
    coming back returns them (capabilities(7)).
    """
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def _openat2(base: int, path: str, flags: int, mode: int, resolve: int) -> int:
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=mode, resolve=resolve)
    return _call(_OPENAT2, base, os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)), path=path)


def _call(number: int, *arguments: object, path: str = "") -> int:
    for _ in range(_TRIES):
        result = int(_libc.syscall(ctypes.c_long(number), *arguments))
        if result >= 0:
            return result
        if ctypes.get_errno() not in {errno.EINTR, errno.EAGAIN}:  # openat2(2): something was renamed meanwhile
            break
    raise _error(path)


def _error(path: str = "") -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), *([path] if path else []))
