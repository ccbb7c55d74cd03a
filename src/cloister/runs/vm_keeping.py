"""Keeping a living machine: its guest holds still, its monitor stops, disks and memory are written, and it goes on.

    keeper `Q` ──▶ guest still ──▶ `stop` ──▶ memory ──▶ disks ──▶ `cont` ──▶ `Q` 0

Firecracker has its guest forget its connections when it writes it: the keeper meets the guest again before it says the
last word to it (shim/keeper_still.c). Whatever fails in between, the last two are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cloister.errors import RetryError, StepError

if TYPE_CHECKING:
    from cloister.plan.vm import VmLaunch
    from cloister.runs.active import ActiveRun

T = TypeVar("T")
STILL_S = 15.0
"""Time in which a guest stands still; on a loaded machine without hardware for it, it may take seconds."""
LEAST_AGENT = 2
"""Version of a guest's shim that holds its processes, and hands them to another keeper."""
LEAST_CARD = 3
"""Version of one that holds its network card as well."""
LEAST_AGAIN = 4
"""Version of one that its keeper can meet again by another connection."""


def memoryless(vm: VmLaunch, agent: object) -> str:
    """Return why a machine's memory cannot be kept; nothing where it can.

    Args:
        vm: the machine.
        agent: the version of its shim, as the guest has said it.
    """
    least = LEAST_CARD if vm.network == "bridge" else LEAST_AGENT
    version, least = str(agent), LEAST_AGAIN if vm.monitor == "firecracker" else least
    if not version.isdigit() or int(version) < least:
        return "its image is older than that: cloister image renew"
    return ""


class Keeping:
    """Of one guest."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing is kept yet."""
        self._loop = loop
        self._still: asyncio.Future[None] | None = None
        self._busy = False

    def told(self) -> None:
        """The guest stands still."""
        if self._still and not self._still.done():
            self._still.set_result(None)

    async def keep(self, run: ActiveRun, take: Callable[[Callable[[], None]], T], *, memory: bool) -> T:
        """Return what `take` does. It runs beside the loop, and gets what lets the guest go on.

        Args:
            run: whose machine it is.
            take: keeps the machine; blocks.
            memory: whether the guest shall hold still for it: not needed for the disks alone.

        Raises:
            CloisterError: nothing was kept, and the guest goes on.
        """
        if self._busy:
            raise RetryError("snapshot-busy", "this machine is being kept", where=run.plan.run, remedy="wait")
        self._busy, gone_on = True, False

        def go_on() -> None:
            nonlocal gone_on
            if memory and not gone_on:
                gone_on = True
                run.inner.send("Q", b"\0")

        try:
            if memory:
                await self._hold(run)

            def later() -> None:
                self._loop.call_soon_threadsafe(go_on)

            return await self._loop.run_in_executor(None, take, later)
        except StepError as error:
            if error.reference == "snapshot-stuck":
                run.live.refuse(error.reference, error.message, [])
            raise
        finally:
            go_on()
            self._busy = False

    async def _hold(self, run: ActiveRun) -> None:
        self._still = self._loop.create_future()
        run.inner.send("Q")
        try:
            await asyncio.wait_for(self._still, STILL_S)
        except TimeoutError:
            message = f"the guest did not hold still within {STILL_S:g} s"
            raise RetryError("guest-restless", message, where=run.plan.run, remedy="the same again") from None
        if run.live.status != "running":
            raise RetryError("run-ending", "the run is ending", where=run.plan.run)
