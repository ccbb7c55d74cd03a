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
from cloister.prove import units

MARKER = "cloister-prove-was-here"
"""A file of this name in the workspace's parent, or this word in a command line, is the trace of a breach."""
PATIENCE_S = 3.0
HAUL = "cloister-prove-haul"
"""Where in the workspace a case leaves what it could read."""
REFUSED_HOST = "refused.cloister-prove.example"
"""What a case asks the proxy for, to be found in the receipt."""
KEEPERS = ("authority", "identity", "logins")
"""Directories of our state that are there to keep a secret."""
STARTUP_FILES = (
    ".bashrc", ".bash_profile", ".profile", ".zshrc", ".zshenv", ".gitconfig", ".config/git/config", ".npmrc", ".netrc",
    ".ssh/authorized_keys", ".ssh/config", ".ssh/rc", ".config/autostart/evil.desktop",
    ".config/systemd/user/evil.service",
    ".config/systemd/user/default.target.wants/evil.service", ".config/environment.d/evil.conf", ".pam_environment",
    ".local/bin/ls", "bin/ls", ".config/fish/config.fish", ".vimrc", ".claude/settings.json", ".codex/config.toml",
    ".pi/agent/settings.json", ".local/share/applications/evil.desktop", ".xprofile", ".inputrc", ".python_history",
)  # fmt: skip
"""Files of a home that something runs or obeys later."""


class Scene(msgspec.Struct, frozen=True):
    """What a check looks at."""

    base: str
    workspace: str
    runtime: str
    home: str
    found_in: Callable[[bytes], list[str]] = lambda _: []
    """Names the agent's secrets that some bytes hold (`known_secrets.py`)."""


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
            ["git", *identity, *words], cwd=scene.workspace, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=20, check=False,
        )  # fmt: skip
    if os.path.lexists(trace):
        os.unlink(trace)
        return "git ran the agent's program on the host"
    return ""


def no_placeholders(scene: Scene) -> str:
    """No name that was absent before the run is there after it."""
    left = [entry.name for entry in effective_names((), ()) if os.path.lexists(f"{scene.workspace}/{entry.name}")]
    left += [name for name in ("refs", ".git/config.worktree", ".git/commondir", ".git/worktrees", ".git/modules")
             if os.path.lexists(f"{scene.workspace}/{name}")]  # fmt: skip
    return f"left in the workspace: {', '.join(left)}" if left else ""


def no_survivor(scene: Scene) -> str:
    """No process of the case lives on."""
    deadline = time.monotonic() + PATIENCE_S
    while survivors := [pid for pid in os.listdir("/proc") if pid.isdigit() and _marked(pid, scene.base)]:
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


def nothing_beside_workspace(scene: Scene) -> str:
    """What an agent writes beside its workspace does not appear on the host."""
    left = [name for name in os.listdir(scene.base) if MARKER in name]
    return f"written on the host: {', '.join(left)}" if left else ""


def nothing_in_store(scene: Scene) -> str:
    """No file of an attack in our state and runtime directories."""
    found = [
        folder
        for place in (f"{scene.base}/state", scene.runtime)
        for folder, _, files in os.walk(place)
        if MARKER in files
    ]
    return f"written on the host: {', '.join(found)}" if found else ""


def home_untouched(scene: Scene) -> str:
    """None of the owner's start-up files holds the marker."""
    home = scene.home
    changed = [name for name in STARTUP_FILES if MARKER.encode() in _content(f"{home}/{name}")]
    return f"changed in the home: {', '.join(changed)}" if changed else ""


def haul_holds_no_secret(scene: Scene) -> str:
    """What the case collected inside, environments, files and memory, holds none of the agent's real secrets."""
    data = _content(f"{scene.workspace}/{HAUL}", 1 << 28)
    if len(data) < 1 << 16:
        return f"the case brought out {len(data)} bytes, so nothing was looked at"
    return "; ".join(scene.found_in(data))


def records_hold_no_secret(scene: Scene) -> str:
    """No file that the battery's runs and its broker wrote holds a real secret: plans, events, receipts, logs."""
    files = [
        f"{folder}/{name}"
        for place in (f"{scene.base}/state/cloister", f"{scene.runtime}/cloister")
        for folder, _, names in os.walk(place)
        if os.path.relpath(folder, place).partition("/")[0] not in KEEPERS
        for name in names
    ]
    if not any(path.endswith("/events.jsonl") for path in files):
        return "no record of a run was found, so nothing was looked at"
    found = [f"{what} in {path}" for path in files for what in scene.found_in(_content(path, 1 << 28))]
    return "; ".join(found)


def no_unit_left(scene: Scene) -> str:
    """Systemd knows no unit of a run that is over."""
    return units.left_over(scene.base)


def refusal_recorded(scene: Scene) -> str:
    """The receipt of the run names the host that it was refused: what stopped it is on record."""
    return units.unsaid(scene.base, scene.workspace, REFUSED_HOST)


def _content(path: str, most: int = 1 << 20) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(most)
    except OSError:
        return b""


def _marked(pid: str, base: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read()
            return f"{MARKER}-process".encode() in line and os.fsencode(base) in line
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
    "nothing-beside-workspace": nothing_beside_workspace,
    "nothing-in-store": nothing_in_store,
    "home-untouched": home_untouched,
    "haul-holds-no-secret": haul_holds_no_secret,
    "records-hold-no-secret": records_hold_no_secret,
    "no-unit-left": no_unit_left,
    "refusal-recorded": refusal_recorded,
}
