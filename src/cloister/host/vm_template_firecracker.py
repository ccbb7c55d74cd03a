"""Templates of Firecracker's machines: made and held by its API; the guest is met by its vsock.

Both sockets lie in a directory that the jailed monitor can write, and nothing else is taken from there. What it writes
of the guest goes into files in memory that it was handed (`/proc/self/fd/N`), so it opens no path of the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from cloister.errors import StepError
from cloister.host import private_files, removal, vm_link, vm_memory, vm_template_monitor, vsock
from cloister.host.firecracker import APPEARS_S, FirecrackerApi
from cloister.host.frames import Channel
from cloister.host.vm_template_monitor import Monitor

DIRECTORY = "vm"
"""Of the sockets, below that in which the template is made."""
_MOST_STATE = 64 << 20
_AGAIN_S = 0.01

Call = tuple[str, str, bytes]
"""Method, path and body of a request."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The monitor to start: its argv, jail included, its descriptors by number, and what it is asked for."""

    argv: tuple[str, ...]
    files: dict[int, int]
    """Number in the monitor → open descriptor here: kernel, initramfs, root, and the jail's filter."""
    disks: tuple[int, ...]
    """Numbers of the placeholders of writable disks."""
    memory: int
    """Number of the file for the guest's memory."""
    state: int
    """Number of the file for the state of its devices."""
    begin: Callable[[str], Sequence[Call]]
    """Returns the calls that start the guest, for a version as the monitor says it."""
    hold: Sequence[Call] = ()
    """Those that write both files."""
    number: int = 0
    """Under which it runs where root starts it; 0: ours."""


class Firecracker:
    """A `Maker` (`vm_template_make`)."""

    def __init__(self, machine: Machine, twin: Machine, *, api: str, channel: str, port: int) -> None:
        """Know how a machine is started that boots, and one that goes on from the template.

        Args:
            machine: the one that boots.
            twin: the other one.
            api: name of the API's socket in `DIRECTORY`.
            channel: name of the vsock's.
            port: of the guest's end of the link.
        """
        self._machine, self._twin = machine, twin
        self._api, self._channel, self._port = api, channel, port

    def write(self, directory: str, state: str, memory: int, settle_s: float) -> tuple[tuple[str, ...], float]:
        """Boot, hold, write down."""
        began = time.monotonic()
        size = os.fstat(memory).st_size
        with _state_file() as written:
            with self._started(directory, self._machine, memory, written) as monitor:
                words = self._hello(monitor, f"{directory}/{DIRECTORY}/{self._channel}")
                boot_s = time.monotonic() - began
                time.sleep(settle_s)
                asyncio.run(_ask(self._api_of(directory), self._machine.hold))
            _keep(written, state)
        if os.fstat(memory).st_size != size:
            raise _failed("firecracker wrote a memory of another size than the guest's")
        return words, boot_s

    def rehearse(self, directory: str, state: str, memory: int) -> tuple[str, ...]:
        """Have a machine come up from what was written, with the memory that was."""
        with (
            _state_file() as copied,
            open(state, "rb", opener=private_files.opener) as kept,
        ):
            size = os.fstat(kept.fileno()).st_size
            os.ftruncate(copied, size)
            vm_memory.copy(kept.fileno(), copied, size)
            with self._started(directory, self._twin, memory, copied) as monitor:
                return self._hello(monitor, f"{directory}/{DIRECTORY}/{self._channel}")

    @contextlib.contextmanager
    def _started(self, directory: str, machine: Machine, memory: int, state: int) -> Iterator[Monitor]:
        """Start a monitor with its guest, in an empty directory that is gone afterwards."""
        sockets = f"{directory}/{DIRECTORY}"
        files: Mapping[int, int] = machine.files | {machine.memory: memory, machine.state: state}
        os.mkdir(sockets, 0o700)
        if machine.number:
            os.chown(sockets, -1, machine.number)
            os.chmod(sockets, 0o770)  # noqa: S103  # its own, and nobody else gets past the directory above
        try:
            with vm_template_monitor.started(directory, machine.argv, files, machine.disks) as monitor:
                try:
                    _await_socket(monitor, f"{sockets}/{self._api}")
                    asyncio.run(_begin(self._api_of(directory), machine.begin))
                except StepError as error:
                    raise monitor.explained(error) from None
                yield monitor
        finally:
            gone = removal.sweep(sockets)
        if not gone:
            raise _failed("firecracker has left what cannot be removed")

    def _api_of(self, directory: str) -> FirecrackerApi:
        return FirecrackerApi(f"{directory}/{DIRECTORY}/{self._api}", owner=self._machine.number or None)

    def _hello(self, monitor: Monitor, path: str) -> tuple[str, ...]:
        """Meet the guest, and leave it alone again; return what it says of itself.

        Raises:
            StepError: it does not come up; told with what was printed last.
        """
        until = time.monotonic() + vm_template_monitor.BOOT_TIMEOUT_S
        try:
            stream = vsock.connect(
                path, self._port, until=until, lives=monitor.lives, owner=self._machine.number or None
            )
            with contextlib.closing(Channel(stream)) as link:
                nonce = vm_link.new_nonce()
                vm_link.greet(link, nonce)
                return vm_link.hello(link, nonce, timeout_s=max(1.0, until - time.monotonic()))
        except StepError as error:
            raise monitor.explained(error) from None


def _await_socket(monitor: Monitor, path: str) -> None:
    """Wait until its API is there; one that has died will not make it."""
    until = time.monotonic() + APPEARS_S
    while not os.path.lexists(path) and time.monotonic() < until:
        if not monitor.lives():
            raise StepError("firecracker-silent", "firecracker has ended", remedy="cloister doctor")
        time.sleep(_AGAIN_S)


async def _begin(api: FirecrackerApi, calls: Callable[[str], Sequence[Call]]) -> None:
    await api.appear()
    await _ask(api, calls(await api.version()))


async def _ask(api: FirecrackerApi, calls: Sequence[Call]) -> None:
    for method, path, body in calls:
        await api.call(method, path, body)


@contextlib.contextmanager
def _state_file() -> Iterator[int]:
    descriptor = vm_memory.new("state", 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _keep(written: int, path: str) -> None:
    """Copy the state into its file; the monitor that wrote it is over."""
    size = os.fstat(written).st_size
    if not 0 < size <= _MOST_STATE:
        raise _failed(f"firecracker wrote a state of {size} bytes")
    with open(path, "xb", opener=private_files.opener) as file:
        os.ftruncate(file.fileno(), size)
        vm_memory.copy(written, file.fileno(), size)
        os.fsync(file.fileno())


def _failed(why: str) -> StepError:
    return StepError("template-failed", f"the template cannot be made: {why}", remedy="cloister doctor")
