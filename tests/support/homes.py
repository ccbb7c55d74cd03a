"""Homes and workspaces as developers have them, with canaries where secrets would be.

A canary is a random word in a file that no sandboxed process may read. A test looks for it in
everything that left the sandbox: output, requests, the workspace.
"""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

CANARY_FILES = (
    ".ssh/id_ed25519",
    ".aws/credentials",
    ".netrc",
    ".config/gh/hosts.yml",
    ".claude/.credentials.json",
    ".codex/auth.json",
    ".pi/agent/auth.json",
    ".bash_history",
)


def make_home(home: Path) -> Path:
    """Make a home with a canary in every file of `CANARY_FILES`, and plain files beside them; return it."""
    for name in CANARY_FILES:
        target = home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"canary-{secrets.token_hex(12)}\n", encoding="utf-8")
        target.chmod(0o600)
    (home / ".bashrc").write_text("# a developer's own\n", encoding="utf-8")
    (home / ".gitconfig").write_text("[user]\n\tname = Dev\n\temail = dev@example.org\n", encoding="utf-8")
    return home


def canaries(home: Path) -> dict[str, str]:
    """Return the canary of each file."""
    return {name: (home / name).read_text(encoding="utf-8").strip() for name in CANARY_FILES}


def make_workspace(folder: Path) -> Path:
    """Make a git repository with one commit; return its folder."""
    folder.mkdir(parents=True)
    (folder / "README").write_text("a project\n", encoding="utf-8")
    git = ("git", "-c", "user.name=Dev", "-c", "user.email=dev@example.org", "-c", "init.defaultBranch=main")
    for arguments in (["init", "-q"], ["add", "README"], ["commit", "-q", "-m", "begin"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True, capture_output=True, timeout=30)
    return folder
