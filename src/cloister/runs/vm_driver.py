"""What a monitor can be asked for while its machine lives: the same few words for QEMU and for Firecracker.

Its argv is not here: that is pure (`isolation/qemu.py`, `isolation/firecracker.py`), and starting and ending it is the
keeper's. Files are names in the run's `vm` directory, which the monitor sees at a place of its own.
"""

from __future__ import annotations

from typing import Protocol


class VmDriver(Protocol):
    """One machine, by its monitor's own control socket."""

    async def configure(self) -> None:
        """Give a fresh monitor its machine and start it; nothing where the argv said it all.

        Raises:
            StepError: the monitor refuses, or is silent.
        """

    async def pause(self) -> None:
        """Hold the guest still."""

    async def resume(self) -> None:
        """Let it go on."""

    async def snapshot(self, state: str, memory: str) -> None:
        """Write the paused machine into two files of these names."""

    async def restore(self, state: str, memory: str, *, resume: bool) -> None:
        """Load such files into a fresh monitor, instead of `configure`."""

    async def balloon(self, mib: int) -> None:
        """Take so many MiB from the guest; 0 gives all back."""

    async def ballooned(self) -> int:
        """Return how many MiB are taken from the guest."""

    async def ask_to_end(self) -> None:
        """Press Ctrl-Alt-Del; whoever does not heed it is ended by the keeper."""
