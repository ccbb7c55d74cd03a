"""When a server of a test can be asked: once it answers, not once its socket is seen, which listens a moment later."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path


def listens(path: Path) -> bool:
    """Whether somebody takes connections at a Unix socket."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.connect(f"/proc/self/fd/{folder}/{path.name}")  # a path may be longer than sun_path (unix(7))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    finally:
        os.close(folder)
    return True


def await_socket(path: Path, within_s: float = 20.0) -> None:
    """Wait until somebody takes connections at a Unix socket."""
    until = time.monotonic() + within_s
    while not listens(path):
        assert time.monotonic() < until, f"nobody listens at {path}"
        time.sleep(0.02)
