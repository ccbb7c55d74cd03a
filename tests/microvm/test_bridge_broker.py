"""A real guest on the bridge whose broker is killed: who takes its port hears nothing of it, and it ends. Root only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microvm.test_bridge_guests import UID, Connected, connected, host, inside, taps, user
from support.homes import make_workspace

__all__ = ["host", "user"]
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(420)]
NOBODY = 65534
LISTENS_S = 6
SPEAKS = """
import os, socket, time
address, _, port = os.environ["CLOISTER_BRIDGE_PROXY"].rpartition("/")[2].rpartition(":")
while True:
    try:
        with socket.create_connection((address, int(port)), 0.5) as sock:
            sock.sendall(b"GET http://blocked.invalid/ HTTP/1.1\\r\\nHost: blocked.invalid\\r\\n\\r\\n")
            print("answered" if sock.recv(9) == b"HTTP/1.1 " else "odd", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
    time.sleep(0.2)
"""
HEARS = """
import socket, sys
with socket.socket() as taken:
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind((sys.argv[1], int(sys.argv[2])))
    taken.listen()
    taken.settimeout(float(sys.argv[3]))
    print("listens", flush=True)
    try:
        print("heard", taken.accept()[1][0])
    except TimeoutError:
        print("silence")
"""


def keepers(monitor: int, broker: int) -> list[int]:
    """Return who would end a monitor when its broker is gone: its keeper, bubblewrap, the outer half."""
    found, pid = [], monitor
    while (pid := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])) not in {0, 1, broker}:
        found.append(pid)
    return found


def test_a_guest_that_outlives_its_broker_is_heard_by_nobody(host: int, user: Connected) -> None:
    """Another user gets the port of a killed broker, and not one connection of the guest that still asks there.

    The guest lives on since whoever would end it stands still; when they can move, machine, tap and record are gone.
    """
    workspace = make_workspace(user.home / "src/project")
    subprocess.run(["chown", "--recursive", f"{UID}:{UID}", user.home / "src"], check=True)
    run = user.begin(f"exec python3 -u -c '{SPEAKS}'", cwd=workspace)
    own = taps(host)[run]
    until = time.monotonic() + 30
    while "answered" not in (said := user.run("logs", run, cwd=workspace).stdout) and time.monotonic() < until:
        time.sleep(0.5)
    assert "answered" in said, "its own proxy hears it"
    (monitor,) = map(int, inside(host, "pgrep", "-f", f"^[^ ]*qemu[^ ]* .*mac={own['mac']}").split())
    watching = keepers(monitor, user.broker_pid)

    for pid in watching:
        os.kill(pid, signal.SIGSTOP)
    os.kill(user.broker_pid, signal.SIGKILL)
    words = [str(own["gateway"]), str(own["port"]), str(LISTENS_S)]
    other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-I", "-c", HEARS]
    sent = frames(host, own["name"])
    heard = inside(host, *other, *words)
    lived = Path(f"/proc/{monitor}").exists()
    spoke = frames(host, own["name"]) - sent
    for pid in watching:
        os.kill(pid, signal.SIGCONT)

    assert lived, "the guest was there all the time"
    assert spoke > 0, "and it asked"
    assert heard.split() == ["listens", "silence"]
    assert connected(host, 0) == set()
    assert not Path(f"/proc/{monitor}").exists()
    assert "clvm" not in inside(host, "ip", "link")


def frames(host: int, tap: str) -> int:
    """Return how many frames have come from a guest."""
    (shown,) = json.loads(inside(host, "ip", "-json", "-statistics", "link", "show", "dev", tap))
    return int(shown["stats64"]["rx"]["packets"])
