"""Whether a path would be there, readable and writable in a sandbox, decided from the argv that builds it.

The answer comes from what bubblewrap is told, not from the policy, so that it is right also
where the two would differ. Mounts are applied in order: the last one at a path or above it is
the one that counts. Links are followed as the agent's calls would follow them, inside. What
the host has is asked for through `Look`. Starts nothing, changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from posixpath import dirname, join, normpath
from typing import Literal, NamedTuple

import msgspec

from cloister.plan.steps import Launch, Listen, ListenAgent, Placeholders, Plan, WriteBytes, WriteFile

_ONE = frozenset(
    {
        *("--uid", "--gid", "--hostname", "--cap-drop", "--cap-add", "--seccomp", "--chdir", "--unsetenv"),
        *("--block-fd", "--sync-fd", "--info-fd", "--json-status-fd", "--userns", "--userns2", "--pidns"),
    }
)
"""Options of bwrap(1) with one argument that mount nothing."""
_MAX_LINKS = 40  # path_resolution(7)
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "shm", "pts", "ptmx", "fd", "stdin", "stdout", "stderr")


_HELD = "absent on the host: held while the run lasts, so that it cannot be made"


class Mounted(NamedTuple):
    """One operation on the sandbox's file system."""

    kind: Literal["ro", "rw", "tmpfs", "symlink", "directory", "proc", "dev", "hidden", "image"]
    target: str
    """Where it is, links of the sandbox followed."""
    source: str = ""
    sealed: bool = False
    """A tmpfs that was made read-only afterwards."""
    written: str = ""
    """Where bubblewrap was told to put it."""


class Seen(NamedTuple):
    """What the host has at a path, as far as this user can do something with it."""

    kind: Literal["absent", "file", "directory", "link"]
    link: str = ""
    readable: bool = False
    writable: bool = False


Look = Callable[[str], Seen]


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """The answer about a path."""

    path: str
    """The path in the sandbox, links followed."""
    exists: bool
    readable: bool
    writable: bool
    """An existing file or directory can be changed; something absent can be made, with the directories above it."""
    mount: str
    """The mount that decides, by its place in the sandbox; empty where there is none."""
    source: str = ""
    """What lies behind it on the host."""
    note: str = ""


def parse_mounts(argv: tuple[str, ...]) -> tuple[Mounted, ...]:
    """Return what bubblewrap's argv does to the file system, in order.

    Raises:
        ValueError: an option is not known here, so no answer would be certain.
    """
    words = iter(argv[1:])
    found: list[Mounted] = []
    perms = ""
    for word in words:
        name = word.removesuffix("-try")
        if word == "--":
            break
        if word in {"--perms", "--size"}:
            perms = next(words) if word == "--perms" else (next(words) and perms)
            continue
        if name in {"--bind", "--dev-bind", "--ro-bind"}:
            source, target = next(words), next(words)
            hidden = source == "/dev/null"
            found.append(Mounted("hidden" if hidden else "ro" if name == "--ro-bind" else "rw", target, source))
        elif word == "--symlink":
            source, target = next(words), next(words)
            found.append(Mounted("symlink", target, source))
        elif word in {"--tmpfs", "--dir", "--proc", "--dev"}:
            kind = {"--tmpfs": "tmpfs", "--dir": "directory", "--proc": "proc", "--dev": "dev"}[word]
            found.append(Mounted("hidden" if perms == "0000" else kind, next(words)))  # type: ignore[arg-type]
        elif word == "--remount-ro":
            found = _seal(found, next(words))
        elif word in _ONE:
            next(words)
        elif not word.startswith(("--unshare-", "--die-with", "--as-pid-1", "--disable-userns", "--new-session")):
            raise ValueError(f"an option of bubblewrap that is not understood here: {word}")
        perms = ""
    return (Mounted("tmpfs", "/", sealed=True), *_placed(found))


def _placed(found: list[Mounted]) -> Iterator[Mounted]:
    """Yield mounts at the places where they really are: `/var/tmp/x` is `/tmp/x` behind a link made before."""
    links: dict[str, str] = {}
    for mount in found:
        target = mount.target
        for _ in range(_MAX_LINKS):
            above = next((link for link in links if target.startswith(link + "/")), "")
            if not above:
                break
            target = normpath(join(dirname(above), links[above]) + target[len(above) :])
        if mount.kind == "symlink":
            links[target] = mount.source
        yield mount._replace(target=target, written=mount.target)


def with_holds(mounts: tuple[Mounted, ...], plan: Plan) -> tuple[Mounted, ...]:
    """Put what was held beforehand behind the bind of the workspace, which brings it along."""
    held = tuple(
        Mounted(hold.mode, hold.target, hold.source or hold.target, written=hold.target) for hold in plan.launch.holds
    )
    found: list[Mounted] = []
    for mount in mounts:
        found.append(mount)
        if mount.kind == "rw" and mount.target == plan.workspace:
            found += held
    return tuple(found)


def _seal(found: list[Mounted], target: str) -> list[Mounted]:
    """Mark the last mount at a place as read-only; the root is sealed from the start."""
    for index in range(len(found) - 1, -1, -1):
        if found[index].target == target:
            return [*found[:index], found[index]._replace(sealed=True), *found[index + 1 :]]
    return found


class Explainer:
    """Answers about the paths of one planned sandbox."""

    def __init__(self, plan: Plan, look: Look, mounts: tuple[Mounted, ...] = ()) -> None:
        """Take a plan that was compiled for the host that `look` sees; `mounts` are a unit's or a guest's."""
        launch: Launch = plan.launch
        self._mounts = mounts or with_holds(parse_mounts(launch.argv), plan)
        self._look = look
        self._held: dict[str, str] = {}
        """What will be made on the host so that something can be mounted onto it."""
        self._made: dict[str, str] = {}
        """What will be made in directories of ours."""
        for step in plan.steps:
            if isinstance(step, Placeholders):
                self._held |= {f"{point.base}/{point.name}": point.kind for point in step.points}
            elif isinstance(step, WriteFile | WriteBytes | Listen | ListenAgent):
                self._made[step.path] = "file" if isinstance(step, WriteFile | WriteBytes) else "socket"

    def ask(self, path: str) -> Access:
        """Answer about an absolute path as the agent would write it."""
        walked, followed, rest = "/", 0, _parts(path)
        while rest:
            part = rest.pop(0)
            here = "/" if part == ".." and walked == "/" else normpath(join(walked, part))
            link = self._link(here)
            if link:
                followed += 1
                if followed > _MAX_LINKS:
                    return Access(
                        path=here, exists=False, readable=False, writable=False, mount="", note="links in a circle"
                    )
                walked, rest = "/" if link.startswith("/") else walked, [*_parts(link), *rest]
                continue
            walked = here
        return self._judge(walked)

    def _link(self, path: str) -> str:
        """Return where a link leads, or nothing."""
        index, mount = self._governing(path)
        for later in self._mounts[index + 1 :]:
            if later.kind == "symlink" and later.target == path:
                return later.source
        if mount.kind in {"ro", "rw"} and path != mount.target:
            seen = self._look(_behind(mount, path))
            return seen.link if seen.kind == "link" else ""
        return ""

    def _governing(self, path: str) -> tuple[int, Mounted]:
        """Return the last mount at a path or above it."""
        for index in range(len(self._mounts) - 1, -1, -1):
            mount = self._mounts[index]
            if mount.kind not in {"symlink", "directory"} and _within(path, mount.target):
                return index, mount
        return 0, self._mounts[0]

    def _judge(self, path: str) -> Access:
        index, mount = self._governing(path)
        at, top = mount.written, mount.target
        match mount.kind:
            case "hidden":
                note = "hidden: empty" if mount.source else "hidden: cannot be opened"
                return Access(path=path, exists=path == top, readable=False, writable=False, mount=at, note=note)
            case "image":
                note = "of the guest's image: there if the image has it"
                return Access(path=path, exists=True, readable=True, writable=False, mount=at, note=note)
            case "proc":
                note = "the sandbox's own processes"
                return Access(path=path, exists=True, readable=True, writable=False, mount=at, note=note)
            case "dev":
                known = path == top or path.split("/")[2] in _DEVICES
                return Access(
                    path=path, exists=known, readable=known, writable=True, mount=at, note="the sandbox's own devices"
                )
            case "tmpfs":
                inside = path == mount.target or any(_within(one.target, path) for one in self._mounts[index + 1 :])
                note = "" if mount.sealed else "fresh, and gone after the run"
                return Access(path=path, exists=inside, readable=inside, writable=not mount.sealed, mount=at, note=note)
            case _:
                return self._behind_bind(path, mount)

    def _behind_bind(self, path: str, mount: Mounted) -> Access:
        source = _behind(mount, path)
        seen = self._look(source)
        if seen.kind == "link":  # only at the mount point itself: bubblewrap mounts what a link leads to
            seen = self._look(seen.link if seen.link.startswith("/") else normpath(f"{dirname(source)}/{seen.link}"))
        writable, note = mount.kind == "rw" and seen.writable, ""
        exists, readable = seen.kind != "absent", seen.readable
        if not exists and (path == mount.target or source in self._made):
            kind = self._held.get(source) or self._made.get(source, "directory")
            exists, readable, writable = True, kind != "socket", mount.kind == "rw"
            note = _HELD if source in self._held else ""
        elif not exists:
            above = self._judge(dirname(path))
            writable = above.writable
        return Access(
            path=path, exists=exists, readable=readable, writable=writable, mount=mount.written,
            source=source, note=note,
        )  # fmt: skip


def _parts(link: str) -> list[str]:
    return [part for part in link.split("/") if part and part != "."]


def _behind(mount: Mounted, path: str) -> str:
    return normpath(mount.source + path[len(mount.target) :]) if mount.target != "/" else path


def _within(path: str, top: str) -> bool:
    return top in {"/", path} or path.startswith(top + "/")


def look(path: str) -> Seen:
    """Look at a path of the host, without following a link at its end."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError):
        return Seen("absent")
    if stat.S_ISLNK(info.st_mode):
        return Seen("link", os.readlink(path))
    directory = stat.S_ISDIR(info.st_mode)
    readable = os.access(path, os.R_OK | (os.X_OK if directory else 0))
    writable = os.access(path, os.W_OK | (os.X_OK if directory else 0))
    return Seen("directory" if directory else "file", "", readable, writable)
