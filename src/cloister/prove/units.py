"""What a battery knows and looks at where runs are units of the system: facts for cases, and systemd's own word.

A person asks here, not root: what systemd and `/proc` tell everybody is all there is.
"""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import time
from typing import Any

import msgspec

from cloister.errors import UnsupportedError
from cloister.host import tar_format
from cloister.plan.unit import (
    AGENTS,
    ETC,
    HOSTD_SOCKET,
    PROXY_RUNTIME,
    PROXY_STATE,
    PROXYD_SOCKET,
    RUNTIME,
    STATE,
    SYSTEM_FILE,
    UNIT_PREFIX,
    System,
)
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.merge import ResolvedAgent
from cloister.runs.store import Store
from cloister.runs.unit_request import UserPart

PATIENCE_S = 5.0


def facts(resolved: ResolvedAgent, uid: int) -> dict[str, Any]:
    """Return what cases may know of the system's side; nothing where the agent is no unit."""
    if resolved.agent.isolation != "unit":
        return {}
    system = System()
    with contextlib.suppress(OSError, msgspec.DecodeError), open(SYSTEM_FILE, "rb") as file:
        system = msgspec.json.decode(file.read(1 << 22), type=System)
    return {
        "unit": True,
        "agent": resolved.name,
        "caller_uid": uid,
        "accounts": [[one.name, one.uid] for one in system.accounts],
        "hostd_socket": HOSTD_SOCKET,
        "unit_sockets": [HOSTD_SOCKET, PROXYD_SOCKET, f"{PROXY_RUNTIME}/runs", "/run/dbus/system_bus_socket"],
        "unit_directories": [AGENTS, PROXY_STATE, PROXY_RUNTIME, STATE, f"{STATE}/hostd", f"{RUNTIME}/units", ETC],
    }


def attack_facts(workspace: str, base: str) -> dict[str, Any]:
    """Return what an honest request to root's daemon holds, for a case to spoil, and the id of the living run."""
    ids = Store(f"{base}/state/cloister/runs").ids()
    part = UserPart(layout=WorkspaceLayout(root=workspace, mounts=(), placeholders=()), project="0" * 16)
    tar = tar_format.encode(tar_format.Entry("carried", "file", 1)) + b"x" + tar_format.padding(1) + tar_format.end()
    return {
        "unit_part": msgspec.json.encode(part).decode(),
        "honest_tar": base64.b64encode(tar).decode(),
        "living_run": ids[-1] if ids else "",
    }


def refuse_another(base: str) -> None:
    """See in the receipt of the first run that it was a unit whose walls were tried: else another thing was attacked.

    Raises:
        UnsupportedError: it was not.
    """
    store = Store(f"{base}/state/cloister/runs")
    receipt = store.receipt(store.ids()[-1]) if store.ids() else None
    if receipt is None or receipt.isolation != "unit" or not str(receipt.host.get("unit", "")).startswith(UNIT_PREFIX):
        raise UnsupportedError("not-a-unit", "the record of the first run does not say that it was a unit", where=base)
    if not receipt.host.get("verified") or not any("verdict=passed" in words for words in receipt.probe):
        raise UnsupportedError("not-verified", "the record does not say what was verified of its unit", where=base)


def left_over(base: str) -> str:
    """Name units of finished runs that systemd still knows (`systemctl show`, which anybody may ask)."""
    names = [f"{UNIT_PREFIX}{run}.service" for run in Store(f"{base}/state/cloister/runs").ids()]
    deadline = time.monotonic() + PATIENCE_S
    while left := [name for name in names[-8:] if _state(name) not in ("inactive", "failed")]:
        if time.monotonic() > deadline:
            return f"still there: {', '.join(left)}"
        time.sleep(0.1)
    return ""


def unsaid(base: str, workspace: str, word: str) -> str:
    """Tell when no receipt of this workspace names a host that was refused."""
    store = Store(f"{base}/state/cloister/runs")
    receipts = [receipt for run in store.ids() if (receipt := store.receipt(run)) and receipt.workspace == workspace]
    named = any(word in line for receipt in receipts for line in receipt.denied)
    return "" if named else f"no receipt names the refused {word}"


def _state(unit: str) -> str:
    done = subprocess.run(
        ["systemctl", "show", "--value", "--property", "ActiveState", unit], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=10, check=False, env={"PATH": os.defpath},
    )  # fmt: skip
    return done.stdout.strip() or f"unknown ({done.stderr.strip()[:80]})"
