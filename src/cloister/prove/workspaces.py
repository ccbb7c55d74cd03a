"""Workspaces of the shapes that cases ask for, made of real git repositories below one directory of ours.

    clone      a repository with one commit, none of the protected names present
    full       the same with every protected name present
    worktree   a linked worktree; the main repository lies beside it
    plain      no repository

Makes directories; judges nothing.
"""

from __future__ import annotations

import os
import subprocess

from cloister.policy.protected import effective_names

_GIT = (
    "git", "-c", "user.name=Prove", "-c", "user.email=prove@example.org", "-c", "init.defaultBranch=main",
    "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false",
)  # fmt: skip


def make(base: str, name: str, shape: str) -> str:
    """Make a workspace below `base` and return its path.

    Raises:
        OSError: it cannot be made.
        subprocess.CalledProcessError: git refused.
    """
    path = f"{base}/{name}"
    if shape == "worktree":
        main = make(base, f"{name}-main", "clone")
        _git(main, "worktree", "add", "-q", "-b", "side", path)
        return path
    os.makedirs(path, mode=0o700)
    _write(f"{path}/README", "a project\n")
    _write(f"{path}/src/main.py", "print('hello')\n")
    if shape != "plain":
        _git(path, "init", "-q")
        _git(path, "add", "-A")
        _git(path, "commit", "-q", "-m", "begin")
    if shape == "full":
        for entry in effective_names((), ()):
            _fill(f"{path}/{entry.name}", entry.kind)
        add_project_policy(path)
    return path


def add_project_policy(path: str) -> None:
    """Put a project file into a workspace, as an owner would: it tightens."""
    _write(f"{path}/.cloister.toml", 'schema = 1\n\n[every_agent.limits]\nruntime_max = "1h"\n')


def _fill(path: str, kind: str) -> None:
    if kind == "directory":
        _write(f"{path}/present.json", "{}\n")
    else:
        _write(path, "present\n")


def _write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _git(directory: str, *arguments: str) -> None:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run([*_GIT, *arguments], cwd=directory, env=environment, check=True, capture_output=True, timeout=30)
