"""What can run a guest here, found out beside the broker's loop: a boot that tries it holds up only who needs it.

Whether KVM or Firecracker work is only known when one has booted a guest (`vm_accelerator`, `vm_monitor`). One boot at
a time: who asks meanwhile waits in the loop, without a thread, and then finds the answer. Who waits is told for what.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from functools import partial
from typing import TYPE_CHECKING

from cloister.runs import prepare_vm

if TYPE_CHECKING:
    from cloister.runs.compile_vm import VmFacts
    from cloister.runs.prepare import Kitchen, Looked


class _MustBootError(Exception):
    """No answer is kept."""


def _refuse(words: str) -> None:
    raise _MustBootError(words)


class Tried:
    """One per broker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kitchen: Kitchen) -> None:
        """Try nothing yet."""
        self._loop, self._kitchen = loop, kitchen
        self._booting = asyncio.Lock()

    async def machine(self, looked: Looked, stderr: int) -> VmFacts:
        """Return image, monitor and accelerator of a run.

        Args:
            looked: what the run asks for.
            stderr: of its caller, who is told what the start waits for; stays the caller's.

        Raises:
            CloisterError: as `prepare_vm.machine_facts`.
        """
        facts = partial(prepare_vm.machine_facts, self._kitchen, looked.agent, looked.resolved, looked.layout.root)
        try:
            return await self._loop.run_in_executor(None, facts, _refuse)
        except _MustBootError as error:
            tell(stderr, str(error))
        async with self._booting:
            return await self._loop.run_in_executor(None, facts)


def tell(stderr: int, words: str) -> None:
    """Write a line to a caller who can take one now; who cannot is not waited for."""
    ready = select.poll()
    ready.register(stderr, select.POLLOUT)
    with contextlib.suppress(OSError):
        if any(events & select.POLLOUT for _, events in ready.poll(0)):
            os.write(stderr, f"cloister: {words}\n".encode())
