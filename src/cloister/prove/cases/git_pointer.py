"""Turn .git of a linked worktree to another repository."""

import os
import subprocess

from cloister.prove.inside.support import Box, append, write

ID = "git-pointer"
TITLE = "Turn .git of a linked worktree to another repository"
PROMISE = "P-021"
CLASSES = (20, 5)
EXPECT = "the pointer and the worktree's own commondir and gitdir are read-only"
SHAPE = "worktree"
CHECKS = ("git-runs-nothing",)
LIFTED_BY = ("workspace.unprotected", "workspace.mode = overlay")


def attack(box: Box) -> None:
    """The pointer, what it leads to, and the main repository's hooks and configuration."""
    pointer = box.path(".git")
    with open(pointer) as file:
        git_dir = file.read().removeprefix("gitdir: ").strip()
    main = os.path.dirname(os.path.dirname(git_dir))
    box.refused("rewrite .git", "EROFS EACCES", write, pointer, f"gitdir: {box.path('evil')}\n")
    box.refused("remove .git", "EBUSY EROFS", os.unlink, pointer)
    box.refused("rename .git", "EBUSY EROFS", os.rename, pointer, box.path("moved"))
    for name in ("commondir", "gitdir", "config.worktree"):
        box.refused(name, "EROFS EACCES ENXIO ENOENT", append, f"{git_dir}/{name}", "evil\n")
    for name in ("config", "hooks/pre-commit", "config.worktree"):
        box.refused(
            f"main {name}",
            "EROFS EACCES ENOENT",
            append,
            f"{main}/{name}",
            '[core]\n\tfsmonitor = touch "$PROVE_MARKER"\n',
        )
    if box.facts.get("guest") and not os.path.exists(f"{main}/HEAD"):
        box.stopped("another worktree: the repository is not in the guest")
        return
    box.refused("another worktree", "EROFS EACCES", os.makedirs, f"{main}/worktrees/evil")


def twin(box: Box) -> None:
    """A commit in the worktree works; an agent in a unit or a guest has the files alone, and no repository."""
    append(box.path("README"), "more\n")
    if box.facts.get("unit") or box.facts.get("guest"):
        box.stopped("the repository lies outside of the workspace, of which nothing is seen here: no git inside")
        return
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["add", "-A"], ["commit", "-q", "-m", "in a worktree"]):
        done = subprocess.run(
            ["git", *identity, *words], cwd=box.workspace, capture_output=True, timeout=20, check=False
        )
        box.works(f"git {words[0]}: {done.stderr.decode()}", done.returncode == 0)
