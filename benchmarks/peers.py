"""The field: other ways to run a command in a sandbox, as their documents say. Found, not installed, here.

`tools/bench` installs what npm and apt have by name; what is not there afterwards is reported as missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BWRAP = "plain bwrap"
BWRAP_ALL = "bwrap, all namespaces"
BWRAP_ARGV = ("bwrap", "--ro-bind", "/", "/")
BWRAP_ALL_ARGV = (
    "bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs",
    "/tmp",
)  # fmt: skip
FIREJAIL_HARD = (
    "firejail", "--quiet", "--noprofile", "--private", "--net=none", "--caps.drop=all", "--nonewprivs", "--noroot",
    "--seccomp", "--private-dev", "--private-tmp",
)  # fmt: skip


class Peer(NamedTuple):
    """One peer: how a command is put behind it, or why it is not there."""

    name: str
    prefix: Sequence[str]
    missing: str = ""


def codex_program() -> str:
    """Return Codex' own program, without the launcher in JavaScript that npm puts before it."""
    agents = Path(os.environ.get("CLOISTER_TEST_AGENTS") or "/nonexistent")
    found = sorted(agents.glob("node_modules/@openai/codex-linux-*/vendor/*/bin/codex"))
    return str(found[0]) if found else ""


def srt_command() -> list[str]:
    """Return how Anthropic's sandbox-runtime is started."""
    script = Path(os.environ.get("CLOISTER_BENCH_PEERS") or "/nonexistent") / (
        "node_modules/@anthropic-ai/sandbox-runtime/dist/cli.js"
    )
    node = node_program()
    return [node, str(script)] if node and script.exists() else []


def node_program() -> str:
    """Return the Node.js that the agents brought."""
    node = Path(os.environ.get("CLOISTER_TEST_AGENTS") or "/nonexistent") / "bin/node"
    return str(node) if node.exists() else shutil.which("node") or ""


def field() -> list[Peer]:
    """Return all peers, those that are missing too."""
    firejail = "" if shutil.which("firejail") else "firejail is not installed"
    codex, srt = codex_program(), srt_command()
    return [
        Peer("firejail --noprofile", ("firejail", "--quiet", "--noprofile"), firejail),
        Peer("firejail, hardened", FIREJAIL_HARD, firejail),
        Peer("codex sandbox", (codex, "sandbox", "--"), "" if codex else "Codex is not installed"),
        Peer("srt", srt, "" if srt else "sandbox-runtime is not installed"),
    ]


def versions() -> dict[str, Sequence[str]]:
    """Return the commands that print the versions of everything compared."""
    srt = srt_command()
    return {
        "cloister": ("cloister", "--version"),
        "Python": ("python3", "--version"),
        "bubblewrap": ("bwrap", "--version"),
        "firejail": ("firejail", "--version"),
        "Codex": (codex_program() or "codex", "--version"),
        "srt": (*srt, "--version") if srt else ("srt", "--version"),
        "Node.js": (node_program() or "node", "--version"),
    }
