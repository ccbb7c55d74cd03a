"""A machine that stands still for a while, by its monitor; whatever happens meanwhile, it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cloister.errors import StepError, UsageError
from cloister.host import qmp
from cloister.runs.vm_control import connect, control_socket
from cloister.runs.vm_firecracker import FirecrackerDriver, driver_of

if TYPE_CHECKING:
    from cloister.plan.vm import VmLaunch

_ATTEMPTS, _AGAIN_S = 5, 0.2


@contextlib.contextmanager
def standing_still(
    vm: VmLaunch, go_on: Callable[[], None] = lambda: None, *, stopped: bool = True
) -> Iterator[qmp.Qmp]:
    """Stop the processors of a machine of QEMU; afterwards `go_on` is called.

    Without `stopped` they are stopped by whoever writes its state: a machine that had been stopped before would not go
    on where that is loaded (QEMU keeps it as a part of the state).

    Raises:
        StepError: the monitor does not obey.
    """
    monitor = connect(control_socket(vm))
    try:
        if stopped:
            monitor.call("stop")
        yield monitor
    finally:
        try:
            _continue(vm, monitor)
        finally:
            go_on()


@contextlib.contextmanager
def paused(vm: VmLaunch, go_on: Callable[[], None] = lambda: None) -> Iterator[FirecrackerDriver]:
    """Do the same with a machine of Firecracker; yield its driver. To be called beside an event loop, not in one.

    Raises:
        StepError: the monitor does not obey.
    """
    driver = driver_of(vm)
    try:
        asyncio.run(driver.pause())
        yield driver
    finally:
        try:
            _attempt(lambda: asyncio.run(driver.resume()))
        finally:
            go_on()


def _continue(vm: VmLaunch, monitor: qmp.Qmp) -> None:
    """Let the processors go on; where the conversation has broken off, over a new one."""
    conversations = [monitor]

    def ask() -> None:
        current = conversations.pop() if conversations else connect(control_socket(vm))
        with contextlib.closing(current):
            current.call("cont")

    _attempt(ask)


def _attempt(ask: Callable[[], None]) -> None:
    """Ask until it is obeyed.

    Raises:
        StepError: `snapshot-stuck`: the monitor obeys nobody any more.
    """
    for _ in range(_ATTEMPTS):
        try:
            ask()
        except (StepError, UsageError):
            time.sleep(_AGAIN_S)
        else:
            return
    raise StepError("snapshot-stuck", "the monitor does not let its machine go on", remedy="cloister vm list")
