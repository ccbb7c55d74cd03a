"""Templates of QEMU's machines: the guest's memory is a file from the beginning, the state of its devices is migrated.

Nobody connects to anything: channel and control socket are descriptors of pairs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping

import msgspec

from cloister.errors import StepError
from cloister.host import private_files, qmp, vm_link, vm_template_monitor
from cloister.host.frames import Channel
from cloister.host.vm_template_monitor import Monitor
from cloister.plan.vm import CHANNEL_FD


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The monitor to start: its argv, jail included, and its descriptors by number."""

    argv: tuple[str, ...]
    files: dict[int, int]
    """Number in the monitor → open descriptor here: kernel, initramfs, root, and the jail's filter."""
    disks: tuple[int, ...]
    """Numbers of the placeholders of writable disks."""
    memory: int
    """Number of the memory, which is shared with a file."""
    orders: int
    """Number of the control socket."""
    state: int = 0
    """Number of the state that it starts from; 0: it boots."""


class Qemu:
    """A `Maker` (`vm_template_make`)."""

    def __init__(self, machine: Machine, twin: Machine) -> None:
        """Know how a machine is started that boots, and one that goes on from the template."""
        self._machine, self._twin = machine, twin

    def write(self, directory: str, state: str, memory: int, settle_s: float) -> tuple[tuple[str, ...], float]:
        """Boot, hold, write down."""
        began = time.monotonic()
        orders, theirs = qmp.pair()
        machine = self._machine
        try:
            given = {machine.memory: memory, machine.orders: theirs}
            with _started(directory, machine, given) as (monitor, channel):
                words = _hello(monitor, channel)
                boot_s = time.monotonic() - began
                control = qmp.adopt(orders)
                time.sleep(settle_s)
                with contextlib.closing(control), open(state, "xb", opener=private_files.opener) as file:
                    control.migrate(file.fileno(), shared=True)
                    monitor.end()
                    os.fsync(file.fileno())
        finally:
            os.close(orders)
        return words, boot_s

    def rehearse(self, directory: str, state: str, memory: int) -> tuple[str, ...]:
        """Have a machine come up from what was written, with the memory that was."""
        twin = self._twin
        kept = os.open(state, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        theirs, orders = qmp.restore_orders(twin.state, shared=True)
        try:
            given = {twin.memory: memory, twin.state: kept, twin.orders: theirs}
            with _started(directory, twin, given) as (monitor, channel):
                return _hello(monitor, channel)
        finally:
            os.close(orders)
            os.close(kept)


@contextlib.contextmanager
def _started(directory: str, machine: Machine, given: Mapping[int, int]) -> Iterator[tuple[Monitor, Channel]]:
    """Start a monitor with a channel to its guest. Its end of the control socket is closed here."""
    channel, theirs = vm_link.pair()
    files = machine.files | {CHANNEL_FD: theirs} | dict(given)
    lent = (theirs, given[machine.orders])
    with (
        contextlib.closing(channel),
        vm_template_monitor.started(directory, machine.argv, files, machine.disks, lent) as monitor,
    ):
        yield monitor, channel


def _hello(monitor: Monitor, channel: Channel) -> tuple[str, ...]:
    """Wait until the guest is up; return what it says of itself.

    Raises:
        StepError: it does not come up; told with what was printed last.
    """
    nonce = vm_link.new_nonce()
    vm_link.greet(channel, nonce)
    try:
        return vm_link.hello(channel, nonce, timeout_s=vm_template_monitor.BOOT_TIMEOUT_S)
    except StepError as error:
        raise monitor.explained(error) from None
