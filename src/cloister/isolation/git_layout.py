"""How git directories are mounted: objects, references and index writable, what makes git run code not.

Per git directory read-only: `hooks`, `config`, `config.worktree`, `commondir`, `worktrees`,
`modules`, each also while absent, since an agent that creates `commondir` moves git to a
configuration of its own. Not protected, on purpose: `info/attributes` and `.gitattributes` only
name drivers that a configuration must define. Names: gitrepository-layout(5).
"""

from __future__ import annotations

from cloister.errors import DeniedError
from cloister.isolation.mounts import Base, Builder, refuse_link
from cloister.plan.workspace import ABSENT, GitDir, Mount, Nested, Protected, Worktree

MAX_MODULES_WRITABLE = 8
MAX_NESTED_WRITABLE = 4
MAX_NESTED_MOUNTED = 16
"""Each costs mounts (about 0.15 ms each), so the rest stays read-only or, past this, unpinned."""

_RULES = (
    Protected("hooks", "directory", why="git hooks"),
    Protected("config", why="git config"),
    Protected("config.worktree", why="git config"),
    Protected("commondir", content=".\n", why="would move git's configuration"),
    Protected("worktrees", "directory", why="git worktrees"),
    Protected("modules", "directory", why="git submodules"),
)
"""A `commondir` of `.` says what git assumes without one (setup.c, get_common_dir_noenv)."""

_STAND_IN = "Kept free by the sandbox; not part of the project.\n"

_WORKTREE_RULES = (Protected("commondir"), Protected("gitdir"), Protected("config.worktree", why="git config"))


def lay_out_git(builder: Builder) -> None:
    """Mount the workspace's own repository and those nested in it.

    Raises:
        DeniedError: a pointer cannot be trusted, or a git path is a symbolic link.
    """
    facts = builder.facts
    if not builder.opted_out(".git"):
        refuse_link(f"{facts.root}/.git", facts.git, ".git")
        if facts.shape == "none":
            _absent(builder)
        elif facts.shape == "pointer":
            _pointer(builder)
        elif facts.directory is not None:
            _git_dir(builder, facts.directory, ".git" if facts.shape == "clone" else "", inside=True)
    if facts.shape in {"none", "clone"}:
        _not_bare(builder)
    _nested(builder)


def lay_out_git_behind(builder: Builder) -> None:
    """For an overlay: show the repository a `.git` file points to, read-only, since it lies outside the copy."""
    facts = builder.facts
    if facts.shape != "pointer":
        return
    if facts.directory is None:
        builder.note(f"git does not work in this workspace: {facts.pointer_problem}")
    elif not facts.directory.path.startswith(f"{facts.root}/"):
        path = facts.directory.path
        builder.mount(Mount("ro", path, path, facts.directory.node, why="git directory"))
        builder.note("the repository lies outside the workspace, so the agent can read history but not commit")


def _absent(builder: Builder) -> None:
    builder.protect_in(builder.base, Protected(".git", "directory", why="no repository here"), builder.facts.git)
    builder.note(
        "this is not a git repository, and the agent cannot make it one: hooks and configuration in a new .git "
        "would run on your machine; run `git init` yourself first"
    )


def _not_bare(builder: Builder) -> None:
    """Keep the top of the workspace from becoming a bare repository.

    Where `.git` is missing or broken (and the agent can break `.git/HEAD`), git takes a directory that
    holds HEAD, objects and refs for a repository and obeys the config beside them (setup.c,
    is_git_directory). One of the three must be kept from being made; not HEAD, because a file of
    that name makes `git diff HEAD` ambiguous.
    """
    for name in ("refs", "objects"):
        if builder.facts.nodes.get(name, ABSENT).kind != "directory":
            builder.protect(Protected(name, content=_STAND_IN, why="would make the workspace a bare repository"))
            return
    builder.note("the workspace has both `refs` and `objects`, so it can be made to look like a bare repository")


def _pointer(builder: Builder) -> None:
    facts = builder.facts
    if facts.directory is None:
        raise DeniedError(
            "git-pointer",
            f"the .git file cannot be trusted: {facts.pointer_problem}",
            where=f"{facts.root}/.git",
            remedy='git worktree repair (in the main repository), or workspace.mode = "overlay"',
        )
    builder.mount(Mount("ro", f"{facts.root}/.git", f"{facts.root}/.git", facts.git, why="git pointer"))
    within = facts.directory.path.startswith(f"{facts.root}/")
    if within:
        builder.pin_above(facts.directory.path[len(facts.root) + 1 :])
    _git_dir(builder, facts.directory, ".git", inside=within)
    if facts.root.startswith(f"{facts.directory.path}/"):
        builder.note(f"the git directory {facts.directory.path} holds this workspace, so what else is in it is visible")


def _git_dir(builder: Builder, found: GitDir, label: str, *, inside: bool) -> None:
    """Mount one git directory, its worktrees and submodules; `label` is its name in `unprotected`."""
    if found.nodes["HEAD"].kind == "absent":
        builder.mount(Mount("ro", found.path, found.path, found.node, why="no valid repository"))
        builder.note(f"{found.path} is not a valid repository, so it is read-only")
        return
    if found.elsewhere:
        raise DeniedError(
            "git-commondir",
            "the git directory keeps its configuration elsewhere, where it cannot be protected",
            where=f"{found.path}/commondir",
            remedy='use a clone or `git worktree add`, or workspace.mode = "overlay"',
        )
    if found.path != builder.facts.root:
        builder.mount(Mount("pin" if inside else "bind", found.path, found.path, found.node, why="git directory"))
    builder.writable_git_dir(found.path)
    prefix = f"{label}/" if label else ""
    base = Base(found.path, found.node, prefix, "file")
    for rule in _RULES:
        builder.protect_in(base, rule, found.nodes[rule.name])
    _children(builder, found, prefix)
    if found.alternates:
        builder.note(f"{found.path} borrows objects from another repository; add that one to filesystem.read")


def _children(builder: Builder, found: GitDir, prefix: str) -> None:
    """Mount the worktrees and submodules of a git directory, unless they are writable on request."""
    if not builder.opted_out(f"{prefix}worktrees"):
        for tree in found.worktrees:
            _worktree(builder, found, tree, prefix)
    if not builder.opted_out(f"{prefix}modules"):
        for module in found.modules[:MAX_MODULES_WRITABLE]:
            _git_dir(builder, module, prefix + module.path[len(found.path) + 1 :], inside=False)
    if found.bounded or len(found.modules) > MAX_MODULES_WRITABLE:
        builder.note(f"{found.path} has many worktrees or submodules; commits work in the first of them only")


def _worktree(builder: Builder, found: GitDir, tree: Worktree, prefix: str) -> None:
    """Give a worktree in the workspace its index and HEAD; others are none of this agent's business.

    The price: `git gc` stops at the reflog of a foreign worktree, with an error and no damage.
    """
    if not tree.inside:
        return
    path = f"{found.path}/worktrees/{tree.name}"
    builder.mount(Mount("bind", path, path, tree.node, why="this worktree"))
    builder.writable_git_dir(path)
    base = Base(path, tree.node, f"{prefix}worktrees/{tree.name}/", "file")
    for rule in _WORKTREE_RULES:
        builder.protect_in(base, rule, tree.nodes[rule.name])


def _nested(builder: Builder) -> None:
    writable = 0
    for count, entry in enumerate(builder.facts.nested):
        if builder.opted_out(entry.name):
            continue
        if entry.node.kind == "symlink" or count >= MAX_NESTED_MOUNTED:
            builder.note(f"{entry.name} cannot be protected during the run; it is looked at afterwards")
            continue
        if not builder.pin_above(entry.name):
            continue
        if entry.directory is not None and not entry.directory.elsewhere and writable < MAX_NESTED_WRITABLE:
            writable += 1
            _git_dir(builder, entry.directory, entry.name, inside=True)
        else:
            _read_only(builder, entry)


def _read_only(builder: Builder, entry: Nested) -> None:
    path = f"{builder.facts.root}/{entry.name}"
    builder.mount(Mount("ro", path, path, entry.node, why="nested repository"))
    if entry.node.kind == "directory":
        builder.note(f"{entry.name} is read-only: there are many nested repositories, or it is no plain one")
