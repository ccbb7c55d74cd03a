"""Making the mounts of a unit from outside, by descriptor, after it has started and before its agent does.

Every source is opened and cloned on the host's side, where its base is a descriptor; then a child enters the unit's
mount namespace, opens every mount's place without following a link, and moves the mount there. No path is
looked up twice, and what came of it is looked at through `/proc/PID/root` by the ids of the mounts. Which
mounts there are, and that they are above the floor, was decided before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import NamedTuple, Self

import msgspec

from cloister.errors import CloisterError, StepError, UnsupportedError
from cloister.host import unit_state
from cloister.host.unit_overlay import Namespace, make_overlay
from cloister.host.unit_syscalls import (
    NODEV,
    NOSUID,
    PATH_ONLY,
    READ_ONLY,
    acting_as,
    attach_mount,
    clone_mount,
    enter_mount_namespace,
    id_namespace,
    mount_id,
    name_host,
    new_terminals,
    new_tmpfs,
    open_absolute,
    open_below,
    set_mount,
)
from cloister.plan.unit import SKELETON, Account, UnitLaunch, UnitMount

HOST_NAME = "cloister"
"""What every agent sees; it is also what its `/etc/hosts` knows."""
_TERMINALS = "/dev/pts"
"""In a private /dev it is the host's, with the terminals of everybody."""
_NOEXEC = 8
_IDS = 1 << 31
_WALK = PATH_ONLY | os.O_NOFOLLOW
_WALK_DIRECTORY = _WALK | os.O_DIRECTORY
_ANSWER_SIZE = 1 << 16
_WRITABLE = frozenset({"rw", "overlay", "tmpfs"})
_USERS = frozenset({"workspace", "copy", "repository"})
"""Bases whose files are the user's: their ids are mapped."""
_IN_PLACE = frozenset({"workspace", "repository"})
"""Bases that are mounted where they lie on the host, and below which mounts cover what they are of."""
_NOT_MADE = "a mount of the unit was not made: "


class Sources(NamedTuple):
    """Descriptors of the bases of a unit's mounts; -1 where there is none. `run` is the run's own directory."""

    workspace: int
    copy: int
    repository: int
    state: int
    box: int
    carry: int
    run: int


class Owners(NamedTuple):
    """Whose the workspace's files are, and who shall see them as the own ones."""

    uid: int
    gid: int
    account: Account


class _Prepared(NamedTuple):
    """A detached mount. `node` is what its place must be where that lies in the workspace."""

    mount: UnitMount
    descriptor: int
    id: int
    directory: bool
    node: tuple[int, int] | None


class _Failure(msgspec.Struct):
    """What the child in the unit's namespace has to say."""

    target: str = ""
    reason: str = ""


class Mounts:
    """The mounts of a unit, made ready before it is there. Use it in a `with` block."""

    def __init__(self, unit: UnitLaunch, sources: Sources, owners: Owners) -> None:
        """Open and clone every source.

        Raises:
            StepError: a source is not what it must be.
            UnsupportedError: this kernel or file system cannot map the ids of the workspace.
        """
        self._unit, self._account = unit, owners.account
        self._prepared: list[_Prepared] = []
        self._helper: _Helper | None = None
        userns = -1
        try:
            if unit.ownership == "idmap":
                userns = map_ids(owners)
            for mount in unit.mounts:
                made = _prepare(mount, sources, owners, userns)
                if made is not None:
                    self._prepared.append(made)
        except BaseException:
            self.close()
            raise
        finally:
            if userns >= 0:
                os.close(userns)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is held; what was put stays where it is."""
        self.close()

    def get_ready(self) -> None:
        """Fork the child that will enter the unit, while there is nothing to enter yet: forking takes its time."""
        self._helper = _Helper(self._prepared, self._account)

    def put(self, pid: int) -> int:
        """Put every mount at its place in the unit whose first process is `pid`; return how many there are.

        Raises:
            StepError: a place is not what it must be, or something else came of it.
        """
        _make_tops(self._unit)
        helper, self._helper = self._helper or _Helper(self._prepared, self._account), None
        helper.put(pid)
        check(pid, [(made.mount, made.id) for made in self._prepared])
        return len(self._prepared)

    def close(self) -> None:
        """Close what is held."""
        helper, self._helper = self._helper, None
        if helper:
            helper.dismiss()
        for made in self._prepared:
            os.close(made.descriptor)
        self._prepared = []


def check(pid: int, made: list[tuple[UnitMount, int]]) -> None:
    """Look from outside whether each mount stands where it was meant to, and is as it was meant to be.

    Raises:
        StepError: one is not.
    """
    root = os.open(f"/proc/{pid}/root", PATH_ONLY | os.O_DIRECTORY)
    try:
        for mount, number in made:
            try:
                place = open_below(root, mount.target[1:], _WALK)
            except OSError as error:
                raise _refused(mount, f"cannot be seen there: {error.strerror}") from error
            try:
                seen, flags = mount_id(place), os.fstatvfs(place).f_flag
            finally:
                os.close(place)
            if seen != number:
                raise _refused(mount, "something else is there")
            if not flags & os.ST_NOSUID or not flags & os.ST_NODEV:
                raise _refused(mount, "it allows set-uid programs or devices")
            if mount.kind not in _WRITABLE and not flags & os.ST_RDONLY:
                raise _refused(mount, "it is writable")
    finally:
        os.close(root)


def map_ids(owners: Owners) -> int:
    """Return a user namespace in which the owner's files are the account's.

    Groups other than the two stay what they are: an agent has none of them, and a file with a group that is not
    mapped could not be written by its owner (fs/namei.c, HAS_UNMAPPED_ID). Users other than the owner stay unmapped.
    """
    account = owners.account
    lower, upper = sorted((owners.gid, account.uid))
    spans = ((0, lower), (lower + 1, upper), (upper + 1, _IDS))
    groups = [f"{start} {start} {end - start}" for start, end in spans if end > start]
    groups.append(f"{owners.gid} {account.uid} 1")
    try:
        return id_namespace(f"{owners.uid} {account.uid} 1\n", "\n".join(groups) + "\n")
    except OSError as error:
        raise _no_mapping(error) from error


def _no_mapping(error: OSError) -> UnsupportedError:
    return UnsupportedError(
        "workspace-ownership", f"the workspace's files cannot be shown as the agent's own: {error.strerror}",
        remedy="a file system with idmapped mounts (ext4, xfs, btrfs; Linux 5.12); or a group that you share: "
        '[agents.X.unit] ownership = "group"; or work on a copy that you review: workspace.mode = "overlay"',
    )  # fmt: skip


def _prepare(mount: UnitMount, sources: Sources, owners: Owners, userns: int) -> _Prepared | None:
    """Return the detached mount, or None where an optional source is absent."""
    flags = NOSUID | NODEV | (READ_ONLY if mount.kind not in _WRITABLE else 0)
    if mount.kind == "tmpfs":
        made = new_tmpfs(_tmpfs_options(mount, owners.account), NOSUID | NODEV)
        return _Prepared(mount, made, mount_id(made), True, None)
    if mount.kind == "overlay":
        if userns < 0 or sources.copy < 0:
            raise _refused(mount, "there is no directory of the user's for what changes")
        made = make_overlay(sources.workspace, sources.copy, Namespace(userns, owners.uid, owners.gid))
        return _Prepared(mount, made, mount_id(made), True, None)
    try:
        source = _open_source(mount, sources)
    except OSError as error:
        if mount.optional and error.errno == errno.ENOENT:
            return None
        raise _refused(mount, f"its source cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(source)
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
            raise _refused(mount, "its source is neither a directory nor a file")
        made = clone_mount(source)
    except OSError as error:
        raise _refused(mount, f"its source cannot be mounted: {error.strerror}") from error
    finally:
        os.close(source)
    mapped = mount.base in _USERS
    try:
        set_mount(made, flags, userns if mapped else -1)
        number = mount_id(made)
    except OSError as error:
        os.close(made)
        raise (_no_mapping(error) if mapped and userns >= 0 else _refused(mount, str(error.strerror))) from error
    node = (status.st_dev, status.st_ino) if mount.base in _IN_PLACE and mount.source else None
    return _Prepared(mount, made, number, stat.S_ISDIR(status.st_mode), node)


def _open_source(mount: UnitMount, sources: Sources) -> int:
    match mount.base:
        case "workspace":
            return open_below(sources.workspace, mount.source, _WALK, one_file_system=True)
        case "copy":
            return open_below(sources.copy, mount.source, _WALK, one_file_system=True)
        case "repository":
            return open_below(sources.repository, mount.source, _WALK, one_file_system=True)
        case "state":
            with acting_as(_owner(sources.state), _owner(sources.state)):
                return open_below(sources.state, mount.source, _WALK, one_file_system=True)
        case "box":
            return open_below(sources.box, mount.source, _WALK, one_file_system=True)
        case "carry":
            return open_below(sources.carry, mount.source, _WALK, one_file_system=True)
        case "host":
            return open_absolute(os.path.realpath(mount.source), _WALK)
        case "none":
            masked = unit_state.MASKED_FILE if mount.kind == "mask-file" else unit_state.MASKED_DIRECTORY
            return open_below(sources.run, masked, _WALK)


def _owner(descriptor: int) -> int:
    return os.fstat(descriptor).st_uid


def _tmpfs_options(mount: UnitMount, account: Account) -> dict[str, str]:
    options = {"mode": "0755"}
    if mount.private:
        options = {"mode": "0700", "uid": str(account.uid), "gid": str(account.uid)}
    if mount.size_bytes is not None:
        options["size"] = str(mount.size_bytes)
    return options


def _make_tops(unit: UnitLaunch) -> None:
    """Make the skeleton's directories for file systems of a unit's own; it is root's on all levels, and nothing else.

    They stay, empty: the next unit needs the same ones.
    """
    for mount in unit.mounts:
        if mount.kind == "tmpfs" and not mount.private:
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{SKELETON}{mount.target}", 0o755)
                os.chmod(f"{SKELETON}{mount.target}", 0o755)  # noqa: S103  # an empty directory of root's


class _Helper:
    """The child that enters the unit's mount namespace. It waits until it is told which; `put` or `dismiss` ends it."""

    def __init__(self, prepared: list[_Prepared], account: Account) -> None:
        """Fork it."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _child(theirs, prepared, account)
        theirs.close()

    def put(self, pid: int) -> None:
        """Have it enter the namespaces of process `pid`, and make the mounts.

        Raises:
            StepError: one was not made.
        """
        given = [os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)]
        answer = b""
        try:
            given += _own_names(pid)
            with contextlib.suppress(OSError), self._socket.makefile("rb") as file:  # it may have died
                socket.send_fds(self._socket, [b"!"], given)
                answer = file.read(_ANSWER_SIZE)
        finally:
            for descriptor in given:
                os.close(descriptor)
        status = self.dismiss()
        if status != 0 or answer:
            told = msgspec.json.decode(answer, type=_Failure) if answer else _Failure(reason="the helper died")
            raise StepError("unit-mount", f"{_NOT_MADE}{told.reason}", where=told.target)

    def dismiss(self) -> int:
        """Let it end; return its status, as waitpid(2) has it."""
        self._socket.close()
        return os.waitpid(self._pid, 0)[1]


def _own_names(pid: int) -> list[int]:
    """Open the UTS namespace of a unit; none where it shares the host's (a nested sandbox, systemd before 258).

    systemd makes one for ProtectHostname=, and leaves the host's name in it.
    """
    names = os.open(f"/proc/{pid}/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(names).st_ino != os.stat("/proc/self/ns/uts").st_ino:
        return [names]
    os.close(names)
    return []


def _child(link: socket.socket, prepared: list[_Prepared], account: Account) -> None:
    """Be the child: wait for the namespaces, make the mounts, and say what failed. Never returns."""
    failure = _Failure()
    try:
        run_of_host = os.stat("/run").st_dev
        failure.target = _TERMINALS
        terminals = new_terminals(NOSUID | _NOEXEC)
        os.umask(0o022)
        word, given, _, _ = socket.recv_fds(link, 1, 2)
        if not word:
            os._exit(0)  # it was not needed
        namespace, *names = given
        for one in names:
            name_host(one, HOST_NAME)
        enter_mount_namespace(namespace)
        attach_mount(terminals, os.open(_TERMINALS, _WALK_DIRECTORY))  # systemd's /dev, which only root can change
        root = os.open("/", PATH_ONLY | os.O_DIRECTORY)
        _furnish_run(root, run_of_host, prepared, account)
        own: dict[int, bool] = {}
        for made in prepared:
            failure.target = made.mount.target
            _put(root, made, own, account)
        os._exit(0)
    except CloisterError as error:
        failure.reason = error.message.removeprefix(_NOT_MADE)
    except (OSError, ValueError) as error:
        failure.reason = str(getattr(error, "strerror", None) or error)
    finally:
        with contextlib.suppress(OSError):
            link.sendall(msgspec.json.encode(failure))
        os._exit(1)


def _furnish_run(root: int, run_of_host: int, prepared: list[_Prepared], account: Account) -> None:
    """Make the places of mounts below `/run`, where systemd gave the unit an empty one, which it sees read-only."""
    wanted = [made for made in prepared if made.mount.target.startswith("/run/")]
    run = open_below(root, "run", _WALK_DIRECTORY)
    if not wanted or os.fstat(run).st_dev == run_of_host:
        return
    clone = clone_mount(run)
    set_mount(clone, NOSUID | NODEV, writable=True)
    for made in wanted:
        *above, last = made.mount.target.split("/")[2:]
        holder = open_below(clone, "", _WALK_DIRECTORY)
        for part in above:
            holder = _step(holder, part, False, {mount_id(clone): False}, account)
        os.close(_step(holder, last, not made.directory, {mount_id(clone): False}, account))


def _put(root: int, made: _Prepared, own: dict[int, bool], account: Account) -> None:
    """Mount at the place. `own` says of each mount made here in which places may be made: whether as the account."""
    place = _place(root, made, own, account)
    try:
        status = os.fstat(place)
        if made.node is not None and (status.st_dev, status.st_ino) != made.node:
            raise _refused(made.mount, "another file stands at its place by now")
        if stat.S_ISLNK(status.st_mode):
            raise _refused(made.mount, "a symbolic link stands at its place")
        attach_mount(made.descriptor, place)
    finally:
        os.close(place)
    if made.mount.kind == "tmpfs":
        own[made.id] = made.mount.private
    elif made.mount.base == "state" and made.mount.kind == "rw":
        own[made.id] = True


def _place(root: int, made: _Prepared, own: dict[int, bool], account: Account) -> int:
    """Open a mount's place; make what is missing, but only in a tmpfs or a state of ours."""
    holder = os.dup(root)
    parts = made.mount.target[1:].split("/")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        try:
            found = _step(holder, part, last and not made.directory, own, account)
        except OSError as error:
            raise _refused(made.mount, f"/{'/'.join(parts[: index + 1])}: {error.strerror}") from error
        finally:
            os.close(holder)
        holder = found
    return holder


def _step(holder: int, name: str, as_file: bool, own: dict[int, bool], account: Account) -> int:
    flags = _WALK if as_file else _WALK_DIRECTORY
    try:
        return open_below(holder, name, flags)
    except FileNotFoundError:
        by_account = own.get(mount_id(holder))
        if by_account is None:
            raise
    with acting_as(account.uid, account.uid) if by_account else contextlib.nullcontext():
        if as_file:
            made = os.open(
                name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=holder
            )
            os.close(made)
        else:
            os.mkdir(name, 0o700 if by_account else 0o755, dir_fd=holder)
        return open_below(holder, name, flags)


def _refused(mount: UnitMount, reason: str) -> StepError:
    return StepError("unit-mount", f"{_NOT_MADE}{reason}", where=mount.target)
