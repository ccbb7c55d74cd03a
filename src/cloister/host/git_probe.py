"""What git would use in a workspace, found by reading git's files: git itself is never run.

A repository's own configuration can make git run programs, so asking git about an untrusted tree
is how one gets owned by it. Layout of the files: gitrepository-layout(5); pointers:
git-worktree(1) and gitsubmodules(7). Everything is bounded; nothing is judged here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from cloister.host import beneath
from cloister.plan.gitconfig import pairs
from cloister.plan.workspace import GIT_NAMES, WORKTREE_NAMES, GitDir, Protected, Worktree

MAX_POINTER_BYTES = 4096
MAX_CONFIG_BYTES = 256 * 1024
MAX_CONFIG_FILES = 32
MAX_WORKTREES = 32
MAX_MODULES = 16
MAX_MODULE_DEPTH = 4
ATTEMPTS = 5


def inside(root: str, path: str) -> str | None:
    """Return `path` relative to `root`, "" for the root itself, None when it is not below it."""
    if path == root:
        return ""
    return path[len(root) + 1 :] if path.startswith(root.rstrip("/") + "/") else None


def above(path: str) -> str:
    """Return the path without its last component."""
    return path.rpartition("/")[0] or "/"


def probe_git_dir(opened: int, path: str, root: str, *, depth: int = 0) -> GitDir:
    """Look at the git directory `path`, open as `opened`, for the workspace `root`."""
    nodes = {name: beneath.look(opened, name) for name in GIT_NAMES}
    worktrees, more_worktrees = (
        _worktrees(opened, path, root) if nodes["worktrees"].kind == "directory" else ((), False)
    )
    modules: tuple[GitDir, ...] = ()
    more_modules = False
    if nodes["modules"].kind == "directory":
        found = tuple(islice(_modules(opened, path, "modules", root, depth), MAX_MODULES + 1))
        modules, more_modules = found[:MAX_MODULES], len(found) > MAX_MODULES
    return GitDir(
        path=path,
        node=beneath.node_of(os.fstat(opened)),
        nodes=nodes,
        worktrees=worktrees,
        modules=modules,
        alternates=beneath.read_file(opened, "objects/info/alternates", limit=MAX_POINTER_BYTES) not in {None, b""},
        elsewhere=_elsewhere(opened),
        bounded=more_worktrees or more_modules,
    )


def _elsewhere(opened: int) -> bool:
    """Whether `commondir` leads away. It may be the placeholder of another run that comes or goes just now."""
    for _ in range(ATTEMPTS):
        text = _pointer(opened, "commondir")
        if text is not None:
            return text not in {".", "./"}
        if beneath.look(opened, "commondir").kind != "file":
            return False  # not there, or a kind that the layout refuses or git does not read
    return True


def looks_like_repository(opened: int) -> bool:
    """Whether git would take this directory for a git directory: HEAD, objects and refs (setup.c, is_git_directory)."""
    return (
        beneath.look(opened, "HEAD").kind in {"file", "symlink"}
        and beneath.look(opened, "objects").kind in {"directory", "symlink"}
        and beneath.look(opened, "refs").kind in {"directory", "symlink"}
    )


def _worktrees(opened: int, path: str, root: str) -> tuple[tuple[Worktree, ...], bool]:
    out: list[Worktree] = []
    with beneath.directory(opened, "worktrees") as listing:
        names = sorted(os.listdir(listing))
        for name in names[:MAX_WORKTREES]:
            node = beneath.look(listing, name)
            if node.kind != "directory":
                continue
            with beneath.directory(listing, name) as entry:
                nodes = {part: beneath.look(entry, part) for part in WORKTREE_NAMES}
                checkout = _pointer(entry, "gitdir")
            place = above(_join(f"{path}/worktrees/{name}", checkout)) if checkout else ""
            out.append(Worktree(name, node, nodes, inside(root, place) is not None))
    return tuple(out), len(names) > MAX_WORKTREES


def _modules(opened: int, path: str, name: str, root: str, depth: int) -> Iterator[GitDir]:
    """Yield git directories below `modules/`; names may hold slashes, so levels in between are descended."""
    if depth >= MAX_MODULE_DEPTH:
        return
    with beneath.directory(opened, name) as listing:
        for part in sorted(os.listdir(listing))[: 4 * MAX_MODULES]:
            if beneath.look(listing, part).kind != "directory":
                continue
            with beneath.directory(listing, part) as entry:
                if looks_like_repository(entry):
                    yield probe_git_dir(entry, f"{path}/{name}/{part}", root, depth=depth + 1)
                    continue
            yield from _modules(opened, path, f"{name}/{part}", root, depth + 1)


class Pointer:
    """Where a `.git` file leads: the common directory, and whether that directory agrees."""

    def __init__(self, root: str, data: bytes | None, uid: int) -> None:
        """Follow the content `data` of `root/.git`; `uid` must own what it names."""
        self.directory: GitDir | None = None
        self.problem = ""
        text = os.fsdecode(data).rstrip("\r\n") if data else ""
        if not text.startswith("gitdir: ") or "\n" in text or "\0" in text:
            self.problem = "it is not a `gitdir:` pointer"
            return
        self.target = _join(root, text[len("gitdir: ") :])
        try:
            opened = beneath.open_root(self.target)
        except OSError as error:
            self.problem = f"{self.target}: {error.strerror}"
            return
        try:
            self._judge(opened, root, uid)
        finally:
            os.close(opened)

    def _judge(self, opened: int, root: str, uid: int) -> None:
        if os.fstat(opened).st_uid != uid:
            self.problem = f"{self.target} belongs to another user"
            return
        common = _pointer(opened, "commondir")
        if common is None or common in {".", "./"}:
            if self._names(opened, root):
                self.directory = probe_git_dir(opened, self.target, root)
            else:
                self.problem = f"{self.target} does not name this directory in core.worktree"
            return
        back = _pointer(opened, "gitdir")
        place = _join(self.target, common)
        if above(self.target) != f"{place}/worktrees":
            self.problem = f"{self.target} is not below {place}/worktrees"
        elif back is None or _join(self.target, back) != f"{root}/.git":
            self.problem = f"{self.target}/gitdir does not name this directory"
        else:
            base = beneath.open_root(place)
            try:
                if os.fstat(base).st_uid != uid:
                    self.problem = f"{place} belongs to another user"
                    return
                self.directory = probe_git_dir(base, place, root)
            finally:
                os.close(base)

    def _names(self, opened: int, root: str) -> bool:
        """Whether a submodule's directory names `root` as its work tree, or lies in it anyway."""
        if inside(root, self.target):
            return True
        data = beneath.read_file(opened, "config", limit=MAX_CONFIG_BYTES) or b""
        worktree = [value for key, value in pairs(os.fsdecode(data)) if key == "core.worktree"]
        return bool(worktree) and _join(self.target, worktree[-1]) == root


def configured(root: str, files: Iterable[tuple[str, str]], home: str) -> tuple[Protected, ...]:
    """Return what git's configuration loads from inside the workspace `root`.

    `files` are pairs of a configuration file and the top of the work tree it serves. Every value
    counts, also one that a later file overrides or a condition (`includeIf`) may switch off.
    """
    queue = list(files)
    seen: set[str] = set()
    out: dict[str, Protected] = {}
    while queue and len(seen) < MAX_CONFIG_FILES:
        path, top = queue.pop(0)
        if path in seen:
            continue
        seen.add(path)
        data = _read_config(path)
        lowered = data.lower()
        if b"hookspath" not in lowered and b"include" not in lowered:
            continue
        for key, value in pairs(os.fsdecode(data)):
            if key == "core.hookspath":
                _add(out, root, _expand(top, value, home), Protected("", "directory", why="core.hooksPath"))
            elif key in {"include.path", "includeif.path"}:
                place = _expand(above(path), value, home)
                _add(out, root, place, Protected("", "file", why="git include.path"))
                queue.append((place, top))
    return tuple(out.values())


def checkout_of(opened: int, path: str) -> str | None:
    """Return the work tree a submodule's git directory names in `core.worktree`."""
    data = beneath.read_file(opened, "config", limit=MAX_CONFIG_BYTES) or b""
    values = [value for key, value in pairs(os.fsdecode(data)) if key == "core.worktree"]
    return _join(path, values[-1]) if values else None


def _add(out: dict[str, Protected], root: str, place: str, entry: Protected) -> None:
    """Record `place` when it lies in the workspace by name or after following links."""
    for spelling in (place, os.path.realpath(place)):
        name = inside(root, spelling)
        if name is not None:
            name = name or "."
            out.setdefault(name, Protected(name, entry.kind, "always", "", entry.why))


def _expand(base: str, value: str, home: str) -> str:
    return _join(base, f"{home}{value[1:]}" if value == "~" or value.startswith("~/") else value)


def _join(base: str, value: str) -> str:
    value = value.replace("\0", "")
    return os.path.normpath(value if value.startswith("/") else f"{base}/{value}")


def _pointer(opened: int, name: str) -> str | None:
    """Return the one line in the file `name`, or None."""
    data = beneath.read_file(opened, name, limit=MAX_POINTER_BYTES)
    return os.fsdecode(data).rstrip("\r\n") if data else None


def _read_config(path: str) -> bytes:
    """Read a configuration file. Links are followed: people link their dotfiles, and only names are taken from it."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    try:
        return os.read(opened, MAX_CONFIG_BYTES)
    except OSError:
        return b""
    finally:
        os.close(opened)
