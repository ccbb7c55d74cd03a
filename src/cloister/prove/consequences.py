"""What a case left on the host: looked at by name after it, since an attack may succeed without the case knowing.

Each check returns what is wrong, or nothing. Checks look at the battery's own directories and
processes only.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import msgspec

from cloister.policy.protected import effective_names

MARKER = "cloister-prove-was-here"
"""A file of this name in the workspace's parent, or this word in a command line, is the trace of a breach."""
PATIENCE_S = 3.0


class Scene(msgspec.Struct, frozen=True):
    """What a check looks at."""

    base: str
    workspace: str
    runtime: str


def git_runs_nothing(scene: Scene) -> str:
    """Use git in the workspace as its owner would: nothing that the agent left may run, and nothing may break."""
    trace = f"{scene.base}/{MARKER}"
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": scene.base,
        "GIT_CONFIG_NOSYSTEM": "1",
        "PROVE_MARKER": trace,
    }
    identity = ("-c", "user.name=Prove", "-c", "user.email=prove@example.org")
    for words in (
        ("status",),
        ("diff",),
        ("log", "-1"),
        ("commit", "-q", "--allow-empty", "-m", "owner"),
        ("checkout", "-q", "HEAD"),
    ):
        subprocess.run(
            ["git", *identity, *words], cwd=scene.workspace, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=20, check=False,
        )  # fmt: skip
    if os.path.lexists(trace):
        os.unlink(trace)
        return "git ran the agent's program on the host"
    return ""


def no_placeholders(scene: Scene) -> str:
    """No name that was absent before the run is there after it."""
    left = [entry.name for entry in effective_names((), ()) if os.path.lexists(f"{scene.workspace}/{entry.name}")]
    left += [name for name in ("HEAD", ".git/config.worktree", ".git/commondir", ".git/worktrees", ".git/modules")
             if os.path.lexists(f"{scene.workspace}/{name}")]  # fmt: skip
    return f"left in the workspace: {', '.join(left)}" if left else ""


def no_survivor(_: Scene) -> str:
    """No process of the case lives on."""
    deadline = time.monotonic() + PATIENCE_S
    while survivors := [pid for pid in os.listdir("/proc") if pid.isdigit() and _marked(pid)]:
        if time.monotonic() > deadline:
            return f"still running: pid {', '.join(survivors)}"
        time.sleep(0.05)
    return ""


def runtime_empty(scene: Scene) -> str:
    """No directory and no socket of a run remains."""
    deadline = time.monotonic() + PATIENCE_S
    while left := _names(f"{scene.runtime}/cloister/runs"):
        if time.monotonic() > deadline:
            return f"left in the runtime directory: {', '.join(left)}"
        time.sleep(0.05)
    return ""


def no_mounts(scene: Scene) -> str:
    """No mount of a run is visible on the host."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        left = [line.split()[4] for line in file if scene.base in line]
    return f"still mounted: {', '.join(left)}" if left else ""


def _marked(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return f"{MARKER}-process".encode() in file.read()
    except OSError:
        return False


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


CHECKS: dict[str, Callable[[Scene], str]] = {
    "git-runs-nothing": git_runs_nothing,
    "no-placeholders": no_placeholders,
    "no-survivor": no_survivor,
    "runtime-empty": runtime_empty,
    "no-mounts": no_mounts,
}
