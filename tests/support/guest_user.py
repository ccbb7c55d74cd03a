"""A user of Cloister whose agent runs in the guest image of the tests."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol

from support.cloister import BASE, User

BOOT_S = 180
"""A boot takes 1.3 s alone, and many times that beside others."""


class Installs(Protocol):
    """The fixture `image` of tests/microvm."""

    def install(self, home: Path) -> None:
        """Put it into a user's store."""


def policy(*tables: str) -> str:
    """Return a policy whose agent `shell` runs in the image of the tests; no template is made, as that takes a boot."""
    head = f'{BASE}isolation = "microvm"\ncommand = ["/bin/sh"]\n'
    microvm = next((table for table in tables if "[agents.shell.microvm]" in table), "[agents.shell.microvm]\n")
    rest = [table for table in tables if "[agents.shell.microvm]" not in table]
    return "\n".join([head, microvm.rstrip("\n"), 'image = "test"\nmemory = "256M"\nwarm = false\n', *rest])


class GuestUser(User):
    """One user, with the image in the store and its key trusted."""

    def __init__(self, home: Path, image: Installs, *tables: str) -> None:
        """Install the image and write the policy; start nothing."""
        super().__init__(home, policy(*tables))
        image.install(home)

    def inside(
        self, script: str, *, cwd: Path, agent: str = "shell", timeout_s: float = BOOT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script in a guest of its own."""
        return super().inside(script, cwd=cwd, agent=agent, timeout_s=timeout_s)

    def begin(self, script: str = "sleep 600", *, cwd: Path) -> str:
        """Start a detached run and return its id, when its agent runs."""
        started = self.run("run", "--detach", "shell", "--", "/bin/sh", "-c", script, cwd=cwd, timeout_s=BOOT_S)
        assert started.returncode == 0, started.stderr
        return started.stdout.strip()

    def exec(self, run: str, script: str, *, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a shell script in a living guest."""
        return self.run("exec", run, "--", "/bin/sh", "-c", script, cwd=cwd, stdin=stdin, timeout_s=BOOT_S)
