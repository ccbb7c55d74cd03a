"""Workspaces to attack: a plain directory, a clone, a linked worktree."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from workspace_box import UID, Box, host


@pytest.fixture
def place():
    """Give a directory all of whose parents the owner may enter."""
    path = Path(tempfile.mkdtemp(prefix="cloister-workspace-", dir="/tmp"))
    path.chmod(0o755)
    for name in ("project", "state", "outside"):
        (path / name).mkdir()
        os.chown(path / name, UID, UID)
    (path / "contents").mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def plain(place):
    """Give a box around a plain directory."""
    return Box(place / "project", place / "state")


@pytest.fixture
def clone(place, plain):
    """Give a box around a clone with one commit and an `origin` beside it."""
    host(place / "project", "git init -q; echo a > a; git add a; git commit -qm first; git tag v1")
    return plain


@pytest.fixture
def worktree(clone, place):
    """Give a box around a linked worktree of a repository elsewhere."""
    host(clone.root, "git worktree add -q ../outside/tree -b topic")
    return Box(place / "outside/tree", place / "state")
