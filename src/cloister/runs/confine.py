"""Putting a run under its limits between the self-probe and the agent's start.

The systemd manager may take its time, so that happens beside the event loop. Only when the
limits are read back from the kernel may the agent start; any doubt ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister.errors import StepError
from cloister.host import limits
from cloister.plan.steps import LimitCgroup, LimitScope

if TYPE_CHECKING:
    from cloister.runs.active import ActiveRun


def confiner(loop: asyncio.AbstractEventLoop, run: ActiveRun) -> Callable[[], None] | None:
    """Return what puts the run under its limits and then releases it; None where no step asks for that."""
    step = next((step for step in run.plan.steps if isinstance(step, (LimitCgroup, LimitScope))), None)
    if step is None:
        return None
    tasks: set[asyncio.Task[None]] = set()

    async def confine() -> None:
        try:
            run.cgroup = await loop.run_in_executor(None, limits.enter, step, run.outer_pid)
        except StepError as error:
            words = [part for part in (error.message, error.where) if part]
            run.live.refuse(error.reference, "the limits could not be put in force", words)
            return
        if run.live.status == "starting":
            run.release()
        else:  # it ended meanwhile, and its undoing may have come before the scope
            with contextlib.suppress(OSError):
                limits.leave(step)

    def start() -> None:
        task = loop.create_task(confine())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return start
