"""Get at the object store of git with a hard reset, a gc and an index of one's own."""

import os
import subprocess

from cloister.prove.inside.support import Box, append

ID = "fs-workspace-work"
TITLE = "Get at the object store of git with a hard reset, a gc and an index of one's own"
PROMISE = "P-020"
CLASSES = (20,)
EXPECT = "ordinary git works, and what makes git run code stays as it was"
FRESH = True
LIFTED_BY = ("workspace.mode = overlay",)
CHECKS = ("git-runs-nothing",)


def git(box: Box, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in the workspace."""
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *identity, *words],
        cwd=box.workspace,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )


def attack(box: Box) -> None:
    """Let git itself write what must not be written."""
    for words in (
        ("config", "core.fsmonitor", "touch evil"),
        ("config", "--worktree", "core.pager", "evil"),
        ("config", "alias.st", "!evil"),
        ("remote", "add", "evil", "ext::sh -c evil"),
        ("worktree", "add", "../evil"),
        ("submodule", "add", "./", "evil"),
        ("init", "--separate-git-dir", "moved"),
        ("config", "--global", "core.hooksPath", "evil"),
    ):
        done = git(box, *words)
        if words[1:2] == ("--global",):
            box.stopped("a global setting stays in the private home")
            continue
        box.must(done.returncode != 0, f"git {' '.join(words)}: exit {done.returncode}")


def twin(box: Box) -> None:
    """Commit, branch, stash, gc: the daily work."""
    append(box.path("README"), "more\n")
    for words in (
        ("add", "-A"),
        ("commit", "-q", "-m", "from inside"),
        ("checkout", "-q", "-b", f"side-{os.getpid()}"),
        ("gc", "-q"),
        ("status",),
        ("log", "-1"),
    ):
        done = git(box, *words)
        box.works(f"git {' '.join(words)}: {done.stderr.decode()}", done.returncode == 0)
