"""Looking at a workspace after a run for what mounts could not prevent: it reports, it undoes nothing.

An agent that may create directories may create a repository in one, and git on the host runs
programs that such a repository's configuration names; it may leave an unfinished rebase whose
list holds `exec` lines. And a person who replaces a protected file on the host during a run
(`git config` renames a new file over the old) takes its mount away (namespaces(7)). The evidence is
the change time, which only the kernel sets: what changed since the run began is new. No
state is kept from before the run. Deeper or larger trees than the bounds are said to be so.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable

from cloister.host import beneath
from cloister.plan.gitconfig import pairs
from cloister.plan.gitindex import forged_paths
from cloister.plan.workspace import Value, WorkspaceLayout

MAX_DEPTH = 24
MAX_DIRECTORIES = 10_000
MAX_FINDINGS = 100
MAX_CONFIG_BYTES = 256 * 1024
MAX_INDEX_BYTES = 256 << 20
MAX_GIT_DIRECTORIES = 2_000

TICK_NS = 20_000_000
"""File systems stamp with the last clock tick, up to 10 ms old at HZ=100; see current_time() in fs/inode.c."""

_IN_GIT = {
    "rebase-merge": "an unfinished rebase; its list may hold `exec` lines: read .git/rebase-merge/git-rebase-todo",
    "rebase-apply": "an unfinished rebase or `git am`",
    "sequencer": "an unfinished cherry-pick or revert",
    "remotes": "old-style remotes, which `git fetch NAME` obeys",
    "branches": "old-style remotes, which `git fetch NAME` obeys",
    "refs/replace": "git now shows other content for some objects than their names say (git-replace(1))",
    "info/exclude": "files may be hidden from `git status`",
    "objects/info/alternates": "objects are now borrowed from another directory",
}
_NEW_GIT = "a new repository: git runs programs its configuration names; look before you cd or `git status` here"
_NEW_BARE = "looks like a bare repository, and git obeys its config; look before you cd here"
_CHANGED_GIT = "its hooks or configuration changed during the run"
_FORGED = "a forged index; `git checkout` would write these paths: remove it, then `git reset`"
_GIT_LINK = "a new symbolic link, through which git on the host would write: remove it before using git"
_NEW_SETTINGS = "new or changed; tools load it when this directory is opened"
_BARE = frozenset({"HEAD", "objects", "refs"})
_REPLACED = "was replaced or changed on the host during the run; from then on the agent could write it"


class Finding(Value, frozen=True):
    """One thing to look at."""

    path: str
    what: str


class Report(Value, frozen=True):
    """What was found, and whether everything within the tree was looked at."""

    findings: tuple[Finding, ...]
    complete: bool


def look_after(made: WorkspaceLayout, names: Iterable[str], *, since_ns: int) -> Report:
    """Look at the workspace of `made` after its placeholders have been removed.

    Args:
        made: the layout the run had.
        names: names of the protected list; the first component is looked for in subdirectories.
        since_ns: when the run began, in nanoseconds since the epoch (`time.time_ns()`).
    """
    since_ns -= TICK_NS
    out = [*_replaced(made, since_ns), *_in_git(made.git_dirs, since_ns)]
    try:
        opened = beneath.open_root(made.root)
    except OSError as error:
        return Report((Finding(made.root, f"cannot be looked at any more: {error.strerror}"),), complete=False)
    try:
        interesting = frozenset(name.split("/")[0] for name in names) - {".git"}
        found, complete = _Scan(made, interesting, since_ns).walk(opened)
    finally:
        os.close(opened)
    out += found
    return Report(tuple(out[:MAX_FINDINGS]), complete=complete and len(out) <= MAX_FINDINGS)


def _replaced(made: WorkspaceLayout, since_ns: int) -> Iterable[Finding]:
    for mount in made.mounts:
        if mount.op == "ro" and mount.node.kind == "file" and _changed(mount.source) >= since_ns:
            yield Finding(mount.source, _REPLACED)


def _in_git(git_dirs: Iterable[str], since_ns: int) -> Iterable[Finding]:
    for directory in git_dirs:
        for name, what in _IN_GIT.items():
            path = f"{directory}/{name}"
            if _changed(path) >= since_ns and not _empty(path):
                yield Finding(path, what)
        yield from _links(directory, since_ns)
        yield from _indexes(directory, since_ns)


def _indexes(directory: str, since_ns: int) -> Iterable[Finding]:
    """Yield index files, split ones too, that hold paths git would not have put there."""
    try:
        names = os.listdir(directory)
        opened = beneath.open_root(directory)
        # A worktree's own directory has no configuration; its repository's lies two levels up.
        common = beneath.open_root(directory.rpartition("/worktrees/")[0] or directory)
    except OSError:
        return
    try:
        size = hash_bytes(common, "config")
        for name in names:
            if (name != "index" and not name.startswith("sharedindex.")) or _changed(name, opened) < since_ns:
                continue
            data = beneath.read_file(opened, name, limit=MAX_INDEX_BYTES)
            bad = ["(too large to read)"] if data is None else forged_paths(data, hash_bytes=size)
            if bad:
                yield Finding(f"{directory}/{name}", f"{_FORGED}: {', '.join(bad)}")
    finally:
        os.close(opened)
        os.close(common)


def hash_bytes(opened: int, name: str) -> int:
    """Return the length of object names by the configuration file `name` (`extensions.objectFormat`)."""
    data = beneath.read_file(opened, name, limit=MAX_CONFIG_BYTES) or b""
    formats = [value.lower() for key, value in pairs(os.fsdecode(data)) if key == "extensions.objectformat"]
    return 32 if formats[-1:] == ["sha256"] else 20


def _links(directory: str, since_ns: int) -> Iterable[Finding]:
    """Yield new symbolic links in a git directory: git writes COMMIT_EDITMSG, FETCH_HEAD and reflogs through them."""
    queue = deque([directory])
    seen = 0
    while queue and seen < MAX_GIT_DIRECTORIES:
        place = queue.popleft()
        seen += 1
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_symlink() and _changed(entry.path) >= since_ns:
                        yield Finding(entry.path, _GIT_LINK)
                    elif entry.is_dir(follow_symlinks=False) and entry.name not in {"objects", "modules"}:
                        queue.append(entry.path)
        except OSError:
            continue


class _Scan:
    """The walk over the tree, and what it looks for."""

    def __init__(self, made: WorkspaceLayout, names: frozenset[str], since_ns: int) -> None:
        self._root = made.root
        self._protected = {mount.target for mount in made.mounts}
        self._names = names
        self._since_ns = since_ns

    def walk(self, opened: int) -> tuple[list[Finding], bool]:
        """Return the findings below the open directory, and whether the walk reached everything."""
        queue: deque[tuple[str, int]] = deque([("", 0)])
        found: list[Finding] = []
        complete = True
        seen = 0
        while queue:
            name, depth = queue.popleft()
            seen += 1
            if seen > MAX_DIRECTORIES or len(found) > MAX_FINDINGS:
                return found, False
            try:
                with beneath.directory(opened, name) as listing, os.scandir(listing) as entries:
                    below = self._look(listing, name, list(entries), found)
            except OSError:
                complete = False
                continue
            if depth < MAX_DEPTH:
                queue.extend((f"{name}/{child}" if name else child, depth + 1) for child in below)
            else:
                complete = complete and not below
        return found, complete

    def _look(self, listing: int, name: str, children: list[os.DirEntry[str]], found: list[Finding]) -> list[str]:
        """Judge one directory and return the names of those below it."""
        place = f"{self._root}/{name}" if name else self._root
        names = {child.name for child in children}
        found += self._repositories(listing, place, names)
        if name:
            found += self._settings(listing, place, names)
        return [child.name for child in children if child.name != ".git" and child.is_dir(follow_symlinks=False)]

    def _repositories(self, listing: int, place: str, names: set[str]) -> Iterable[Finding]:
        if ".git" in names and f"{place}/.git" not in self._protected:
            if _changed(".git", listing) >= self._since_ns:
                yield Finding(f"{place}/.git", _NEW_GIT)
            elif max(_changed(f".git/{name}", listing) for name in ("config", "hooks", "commondir")) >= self._since_ns:
                yield Finding(f"{place}/.git", _CHANGED_GIT)
        known = place in self._protected and f"{place}/hooks" in self._protected
        if not known and names >= _BARE and max(_changed(name, listing) for name in _BARE) >= self._since_ns:
            yield Finding(place, _NEW_BARE)

    def _settings(self, listing: int, place: str, names: set[str]) -> Iterable[Finding]:
        for name in sorted(self._names & names):
            if f"{place}/{name}" not in self._protected and _changed(name, listing) >= self._since_ns:
                yield Finding(f"{place}/{name}", _NEW_SETTINGS)


def _changed(path: str, base: int | None = None) -> int:
    """Return the change time in nanoseconds, 0 where there is nothing."""
    try:
        return os.stat(path, dir_fd=base, follow_symlinks=False).st_ctime_ns
    except OSError:
        return 0


def _empty(path: str) -> bool:
    """Tell whether nothing is in it: bubblewrap inside leaves empty files where Claude Code's sandbox masks a path."""
    try:
        info = os.lstat(path)
        return info.st_size == 0 if stat.S_ISREG(info.st_mode) else not os.listdir(path)
    except OSError:
        return False
