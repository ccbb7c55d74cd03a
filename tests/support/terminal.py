"""A terminal with a person at it: starts a command in a session of its own, types, and reads the screen.

We are the emulator: the master end is here. Nothing is interpreted; a test looks for text.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self


class Terminal:
    """One terminal, and the one command started in it. A context manager: what still runs at its end is hung up."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], size: tuple[int, int] = (24, 80)):
        """Start the command; `size` is rows and columns."""
        self.master, slave = pty.openpty()
        self.name = os.ttyname(slave)
        self.resize(*size)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.shown = b""
        self.process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**env, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509  # one ioctl(2); no other thread holds a lock it needs
        )

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the window."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.master, keys.encode())

    def until(self, text: str, timeout_s: float = 20) -> str:
        """Read the screen until `text` appears behind what was read before; return what came, up to its end."""
        end = time.monotonic() + timeout_s
        wanted = text.encode()
        while wanted not in self.shown:
            assert time.monotonic() < end, f"{text!r} did not appear: {self.shown!r}"
            self._read(0.05)
        seen, _, self.shown = self.shown.partition(wanted)
        return (seen + wanted).decode("utf-8", "backslashreplace")

    def answer(self, question: str, key: str) -> str:
        """Wait for a question and answer it, after the moment in which the shim is deaf; return what was shown."""
        seen = self.until(question)
        time.sleep(0.4)
        self.type(key)
        return seen

    def silent(self, seconds: float, text: str) -> bool:
        """Return whether `text` does not appear for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._read(0.05)
        return text.encode() not in self.shown

    def wait(self, timeout_s: float = 30) -> int:
        """Read until the command has ended; return its exit code. What it showed stays in `shown`."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.shown!r}"
            self._read(0.05)
        while self._read(0.05):
            pass
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """Whether the modes are those before the start."""
        return termios.tcgetattr(self._slave) == self.before

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        self.shown += os.read(self.master, 65536)
        return True

    def __enter__(self) -> Self:
        """Return the terminal."""
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up, wait, and take the terminal away."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self.master)
        os.close(self._slave)


def _take_terminal() -> None:
    """Make standard input the controlling terminal of the new session (ioctl_tty(2))."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
