"""Sandboxes that are weak on purpose, to see that the battery finds them out. Not for anything else."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class Bare:
    """No sandbox at all."""

    def __init__(self, base: Path) -> None:
        """Use a directory of the test's own."""
        self.base = str(base)
        self.runtime = str(base / "run")
        self.home = str(base)

    @property
    def environment(self) -> dict[str, str]:
        """Little, as in a sandbox, with a home of the test's own."""
        return {"PATH": os.defpath, "HOME": self.base, "LANG": "C.UTF-8"}

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return the words as they are."""
        del directory, pty
        return list(words)

    def stop_broker(self, number: signal.Signals = signal.SIGTERM) -> None:
        """There is none."""
        del number


class Plain(Bare):
    """Bubblewrap as it is often used: namespaces, the whole root read-only, no filter, home and workspace writable."""

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return bubblewrap's argv."""
        del pty
        binds = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", directory, directory]
        return [
            "/usr/bin/bwrap",
            *binds,
            "--unshare-pid",
            "--unshare-net",
            "--unshare-ipc",
            "--die-with-parent",
            *words,
        ]
