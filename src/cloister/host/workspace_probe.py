"""Looking at a workspace before a run: what is where, without following links and within bounds.

The answer is `WorkspaceFacts`. What follows from it (which mounts, which refusals) is for
`isolation/workspace.py`; this module only reads. It never runs git and never walks a whole tree:
the scan for nested repositories stops at `MAX_DEPTH` levels and `MAX_DIRECTORIES` directories.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from cloister.errors import DeniedError, RetryError
from cloister.host import beneath, git_probe
from cloister.plan.workspace import GitDir, GitShape, Nested, Node, WorkspaceFacts

ATTEMPTS = 5
MAX_DEPTH = 4
MAX_DIRECTORIES = 256
MAX_NESTED = 64
MAX_NESTED_OPENED = 8

SKIPPED = frozenset(
    {".git", "node_modules", "__pycache__", ".venv", ".tox", ".nox", ".cache", ".gradle", "target", ".next"}
)
"""Directories that tools fill by the thousand. What hides there is found by the look after the run."""


def probe_workspace(
    root: str, names: Iterable[str], *, uid: int, home: str, git_configs: Iterable[str] = ()
) -> WorkspaceFacts:
    """Look at the directory `root`.

    Args:
        root: absolute path without symbolic links, as getcwd(3) or realpath(3) gives it.
        names: relative paths whose presence matters (the protected names).
        uid: who the run belongs to; git directories outside the workspace must be theirs.
        home: the person's home, for `~` in git's configuration.
        git_configs: git configuration files outside the repository (`~/.gitconfig`, `/etc/gitconfig`).

    Raises:
        DeniedError: the root is not there, is a link, is no directory or cannot be opened.
        RetryError: it changed under every look.
    """
    request = _Request(tuple(names), uid, home, tuple(git_configs))
    opened = _open(root)
    try:
        for _ in range(ATTEMPTS - 1):
            # Another run's placeholders, or git's own files, may go between two looks.
            with suppress(FileNotFoundError):
                return _look_into(opened, root, request)
        return _look_into(opened, root, request)
    except FileNotFoundError as error:
        message = "the workspace keeps changing while it is looked at"
        raise RetryError("workspace-changing", message, where=root, remedy="try again when it is quiet") from error
    except OSError as error:
        raise DeniedError(
            "workspace-unreadable", f"cannot look at the workspace: {error.strerror}", where=root
        ) from error
    finally:
        os.close(opened)


class _Request(NamedTuple):
    """What to look for; see `probe_workspace`."""

    names: tuple[str, ...]
    uid: int
    home: str
    git_configs: tuple[str, ...]


def _look_into(opened: int, root: str, request: _Request) -> WorkspaceFacts:
    status = os.fstat(opened)
    git = beneath.look(opened, ".git")
    shape, directory, problem = _repository(opened, root, git, request.uid)
    nested, complete = scan(opened)
    found = _nested(opened, root, nested, directory)
    files = _config_files(root, directory, found, request.git_configs)
    configured = git_probe.configured(root, files, request.home)
    wanted = [*request.names, *(entry.name for entry in configured if entry.name != ".")]
    wanted += [*(entry.name for entry in found), "refs", "objects"]
    return WorkspaceFacts(
        root=root,
        node=beneath.node_of(status),
        owner=status.st_uid,
        writable=os.access(f"/proc/self/fd/{opened}", os.W_OK | os.X_OK),
        nodes=look_at(opened, wanted),
        git=git,
        shape=shape,
        directory=directory,
        pointer_problem=problem,
        configured=configured,
        nested=found,
        scan_complete=complete,
    )


def find_project(start: str, *, home: str, uid: int | None = None) -> str:
    """Return the top of the git work tree that holds `start`, else `start`.

    git needs the top: its index and ignore rules cover the whole work tree. The search stops below
    `home` and below `/`, so a home that is a repository does not become a workspace. A `.git` that
    does not belong to `uid` (by default the process's own) does not count: git calls that dubious
    ownership (CVE-2022-24765). Nor does an empty one.
    """
    owner = os.geteuid() if uid is None else uid
    place = start
    while place not in {"/", home}:
        if _is_repository(f"{place}/.git", owner):
            return place
        place = git_probe.above(place)
    return start


def _is_repository(path: str, uid: int) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if status.st_uid != uid:
        return False
    return not stat.S_ISDIR(status.st_mode) or os.path.lexists(f"{path}/HEAD")


def look_at(opened: int, names: Iterable[str]) -> dict[str, Node]:
    """Look at each relative path and each of its parents; below what is no directory everything is absent."""
    nodes: dict[str, Node] = {}
    for name in names:
        parts = beneath.split(name)
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if path not in nodes:
                nodes[path] = beneath.look_below(opened, path)
            if nodes[path].kind != "directory":
                break
        nodes.setdefault("/".join(parts), Node())
    return nodes


def scan(opened: int) -> tuple[list[str], bool]:
    """Return the relative paths of nested `.git` entries, breadth first, and whether the scan was complete."""
    queue: deque[tuple[str, int]] = deque([("", 0)])
    found: list[str] = []
    seen = 0
    while queue:
        name, depth = queue.popleft()
        seen += 1
        if seen > MAX_DIRECTORIES or len(found) > MAX_NESTED:
            return found[:MAX_NESTED], False
        try:
            with beneath.directory(opened, name) as listing, os.scandir(listing) as entries:
                children = list(entries)
        except OSError:
            continue  # gone, or not readable by the person the agent runs as
        for child in children:
            path = f"{name}/{child.name}" if name else child.name
            if child.name == ".git":
                if name:
                    found.append(path)
            elif depth < MAX_DEPTH and child.name not in SKIPPED and child.is_dir(follow_symlinks=False):
                queue.append((path, depth + 1))
    return found, True


def _open(root: str) -> int:
    if not root.startswith("/") or os.path.normpath(root) != root:
        raise DeniedError(
            "workspace-path", "a workspace is an absolute path without `.`, `..` or a final slash", where=root
        )
    try:
        return beneath.open_root(root) if root != "/" else os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DeniedError("workspace-missing", "the workspace does not exist", where=root) from error
    except (OSError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) else errno.EINVAL
        if code in {errno.ELOOP, errno.ENOTDIR}:
            remedy = "start from the real path"
            with suppress(OSError):  # of a link that is none any more when it is read
                remedy += f": cd {os.path.realpath(root)}"
            message = "the workspace is not a directory, or its path goes through a symbolic link"
            raise DeniedError("workspace-not-directory", message, where=root, remedy=remedy) from error
        raise DeniedError("workspace-unreadable", f"cannot open the workspace: {error}", where=root) from error


def _repository(opened: int, root: str, git: Node, uid: int) -> tuple[GitShape, GitDir | None, str]:
    if git.kind == "directory":
        with beneath.directory(opened, ".git") as inner:
            # Without a HEAD it is no repository (setup.c, is_git_directory), and may be another run's placeholder:
            # taken for a clone it would not be shared with that run, whose end would remove it under this one.
            if beneath.look(inner, "HEAD").kind != "absent":
                return "clone", git_probe.probe_git_dir(inner, f"{root}/.git", root), ""
        return "none", None, ""
    if git.kind == "file":
        data = beneath.read_file(opened, ".git", limit=git_probe.MAX_POINTER_BYTES)
        pointer = git_probe.Pointer(root, data, uid)
        return "pointer", pointer.directory, pointer.problem
    if git.kind == "absent" and git_probe.looks_like_repository(opened):
        return "bare", git_probe.probe_git_dir(opened, root, root), ""
    return "none", None, ""


def _nested(opened: int, root: str, names: list[str], directory: GitDir | None) -> tuple[Nested, ...]:
    """Look at each nested `.git`; checkouts of known submodules are added, however deep they lie."""
    wanted = dict.fromkeys(names)
    for module in _all_modules(directory):
        base = beneath.open_root(module.path)
        try:
            checkout = git_probe.checkout_of(base, module.path)
        finally:
            os.close(base)
        name = git_probe.inside(root, checkout) if checkout else None
        if name:
            wanted[f"{name}/.git"] = None
    out: list[Nested] = []
    opened_count = 0
    for name in wanted:
        try:
            with beneath.parent(opened, name) as (holder, last):
                node = beneath.look(holder, last)
                inner = None
                if node.kind == "directory" and opened_count < MAX_NESTED_OPENED:
                    opened_count += 1
                    with beneath.directory(holder, last) as entry:
                        if git_probe.looks_like_repository(entry):
                            inner = git_probe.probe_git_dir(entry, f"{root}/{name}", root)
        except OSError:
            continue  # a submodule that is not checked out
        if node.kind != "absent":
            out.append(Nested(name, node, inner))
    return tuple(out)


def _all_modules(directory: GitDir | None) -> list[GitDir]:
    out = list(directory.modules) if directory else []
    for module in out:
        out.extend(module.modules)
    return out


def _config_files(
    root: str, directory: GitDir | None, nested: tuple[Nested, ...], others: Iterable[str]
) -> list[tuple[str, str]]:
    files = [(path, root) for path in others]
    if directory:
        files += [(f"{directory.path}/config", root), (f"{directory.path}/config.worktree", root)]
        files += [
            (f"{directory.path}/worktrees/{tree.name}/config.worktree", root)
            for tree in directory.worktrees
            if tree.inside
        ]
    for entry in nested:
        if entry.directory:
            files.append((f"{entry.directory.path}/config", git_probe.above(f"{root}/{entry.name}")))
    return files
