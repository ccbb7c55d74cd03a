"""A case on a terminal: the host holds the other end, and sees what would be typed into the user's shell."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cloister.prove.session import answer_in, bootstrap

LIMIT_S = 20.0
_START, _END = "<<<case ", ">>>"


def converse(
    argv: Sequence[str], directory: str, environment: Mapping[str, str], request: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run one request with a terminal as all three standard streams; return its answer, and one about the terminal.

    The request goes in as an argument of the command line's program, since a terminal edits what is typed.
    """
    controller, terminal = pty.openpty()
    attributes = termios.tcgetattr(terminal)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    words = [*argv[:-1], bootstrap(request, _START, _END)]
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, cwd=directory, env=dict(environment),
        start_new_session=True,
        preexec_fn=_take_terminal,  # noqa: PLW1509  # one ioctl, no lock
    )  # fmt: skip
    try:
        said = _listen(controller, process)
        typed = _typed(terminal)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(controller)
        os.close(terminal)
    answer = _answer(said)
    if typed:
        return [answer, {"outcome": "allowed", "detail": f"typed into the user's terminal: {typed!r}"}]
    return [answer]


def _take_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _listen(controller: int, process: subprocess.Popen[bytes]) -> str:
    """Return everything printed until the process has ended."""
    data = b""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if select.select([controller], [], [], 0.05)[0]:
            try:
                data += os.read(controller, 1 << 16)
            except OSError:
                break
        elif process.poll() is not None:
            break
    return data.decode("utf-8", "replace")


def _typed(terminal: int) -> bytes:
    """Return what waits as input of the terminal: nobody typed anything, so it must be nothing."""
    attributes = termios.tcgetattr(terminal)
    attributes[3] &= ~termios.ICANON
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    return os.read(terminal, 4096) if select.select([terminal], [], [], 0)[0] else b""


def _answer(said: str) -> dict[str, Any]:
    text = said.replace("\r", "").replace("\n", "")
    nothing = {"outcome": "error", "detail": f"no answer from the terminal: {text[-300:]!r}"}
    return answer_in(text, _START, _END) or nothing
