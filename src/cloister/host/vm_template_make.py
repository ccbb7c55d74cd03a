"""Making a template: boot a guest to where it waits for its orders, stop it, keep its memory and its devices' state.

Before it gets its name another machine is started from it: what cannot do that is no template, whatever the monitor
and this host's processor say. The guest is told nothing: no entropy, no name, no file of a run. Its disks are empty
placeholders, longer than any real one, since a guest believes for ever how long a disk is; the monitor refuses what
lies behind a real one's end. The maker may be killed at any point: the monitor dies with it, what it wrote has another
name than templates have.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from cloister.errors import RetryError, StepError
from cloister.host import qmp, vm_link, vm_memory
from cloister.host.frames import Channel
from cloister.host.vm_template import MAKING, find, remove, tidy
from cloister.plan.vm import CHANNEL_FD, CONSOLE_FD
from cloister.plan.vm_template import MEMORY, RECORD, STATE, Shape, Template

BOOT_TIMEOUT_S = 120.0
SETTLE_S = 0.3
"""Time in which a guest may finish what it put off while it booted."""
PLACEHOLDER_BYTES = 1 << 40
_MIB = 1 << 20
_LAST_WORDS = 8192
_ABOVE = 100
_SHIM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim", "cloister-shim")


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


def make(root: str, shape: Shape, machine: Machine, twin: Machine, *, settle_s: float = SETTLE_S) -> Template:
    """Make the template of a shape, or return the one that another process has made meanwhile. Takes seconds.

    Args:
        root: the directory of templates; made where it is missing.
        shape: what it is for.
        machine: how the monitor is started.
        twin: how one is started that goes on from the template.
        settle_s: how long the guest may tidy up after its boot.

    Raises:
        RetryError: another process is making it.
        StepError: the guest does not come up, or the monitor fails.
    """
    os.makedirs(root, mode=0o700, exist_ok=True)
    tidy(root)
    directory = f"{root}/{MAKING}{shape.key()}"
    lock = _lock(directory)
    published = False
    try:
        template = find(root, shape)
        if template is None:
            with _memory_of(shape) as memory:
                template = _written(directory, shape, machine, memory, settle_s)
                _rehearse(directory, twin, memory, template.hello)
            _publish(directory, f"{root}/{shape.key()}")
            published = True
    except OSError as error:
        raise StepError(
            "template-failed", f"the template cannot be made: {error.strerror or error}", where=directory,
            remedy="cloister doctor",
        ) from None  # fmt: skip
    finally:
        if not published:
            remove(directory)
        os.close(lock)
    tidy(root, newer=shape)
    return template


def _lock(directory: str) -> int:
    """Return the held lock of one that is being made."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            raise BlockingIOError  # it was finished, and renamed, in between
    except OSError:
        os.close(descriptor)
        raise RetryError("template-busy", "this template is being made", where=directory, remedy="wait") from None
    return descriptor


class _Monitor:
    """A started monitor, until its end."""

    def __init__(self, pid: int, channel: Channel, console: int) -> None:
        self._pid, self._channel, self._console = pid, channel, console

    def hello(self) -> tuple[str, ...]:
        """Wait until it is up; return what it says of itself.

        Raises:
            StepError: it does not come up; told with what was printed last.
        """
        nonce = vm_link.new_nonce()
        vm_link.greet(self._channel, nonce)
        try:
            return vm_link.hello(self._channel, nonce, timeout_s=BOOT_TIMEOUT_S)
        except StepError as error:
            raise self._explained(error) from None

    def end(self) -> None:
        """Kill the monitor, and wait until it is over."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def _explained(self, error: StepError) -> StepError:
        """Add what the guest or its monitor printed last."""
        os.set_blocking(self._console, False)
        poll = select.poll()
        poll.register(self._console, select.POLLIN)
        last = b""
        while poll.poll(200):
            piece = b""
            with contextlib.suppress(BlockingIOError):
                piece = os.read(self._console, 65536)
            if not piece:
                break
            last = (last + piece)[-_LAST_WORDS:]
        lines = [
            "".join(char for char in line if char.isprintable()) for line in last.decode("ascii", "replace").split("\n")
        ]
        told = next((line for line in reversed(lines) if line.strip()), "")
        message = f"{error.message}; last words: {told}" if told else error.message
        return StepError(error.reference, message, remedy=error.remedy)


def _written(directory: str, shape: Shape, machine: Machine, memory: int, settle_s: float) -> Template:
    """Boot a guest, hold it, write its files; return the record, which is written as well."""
    began = time.monotonic()
    orders, theirs = qmp.pair()
    try:
        with _started(directory, machine, {machine.memory: memory, machine.orders: theirs}) as monitor:
            words = monitor.hello()
            boot_s = time.monotonic() - began
            control = qmp.adopt(orders)
            time.sleep(settle_s)
            with contextlib.closing(control), open(f"{directory}/{STATE}", "xb", opener=_private) as file:
                control.migrate(file.fileno(), shared=True)
                monitor.end()
                os.fsync(file.fileno())
    finally:
        os.close(orders)
    size = shape.memory_mib * _MIB
    digest, stored = _keep(memory, f"{directory}/{MEMORY}", size)
    state, state_bytes = _digest(f"{directory}/{STATE}")
    record = Template(
        shape=shape, made=time.time(), boot_s=round(boot_s, 3), memory=digest, memory_bytes=size,
        stored_bytes=stored, state=state, state_bytes=state_bytes, hello=words,
    )  # fmt: skip
    _write(f"{directory}/{RECORD}", msgspec.json.encode(record, order="sorted"))
    return record


@contextlib.contextmanager
def _memory_of(shape: Shape) -> Iterator[int]:
    memory = vm_memory.new("guest", shape.memory_mib * _MIB)
    try:
        yield memory
    finally:
        os.close(memory)


def _rehearse(directory: str, twin: Machine, memory: int, hello: tuple[str, ...]) -> None:
    """Have a machine come up from what was written, with the memory that was; then end it.

    Raises:
        StepError: it does not, or is not what was written.
    """
    state = os.open(f"{directory}/{STATE}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    theirs, orders = qmp.restore_orders(twin.state, shared=True)
    try:
        with _started(directory, twin, {twin.memory: memory, twin.state: state, twin.orders: theirs}) as monitor:
            if monitor.hello() != hello:
                raise StepError("template-failed", "a machine from the template says that it is another one")
    finally:
        os.close(orders)
        os.close(state)


@contextlib.contextmanager
def _started(directory: str, machine: Machine, given: Mapping[int, int]) -> Iterator[_Monitor]:
    """Start a monitor; end it whatever happens. Its end of the control socket is closed here."""
    with contextlib.ExitStack() as stack:

        def owned(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        channel, theirs = vm_link.pair()
        stack.callback(channel.close)
        console, printed = os.pipe()
        owned(console)
        files = dict(machine.files) | {CHANNEL_FD: theirs, CONSOLE_FD: printed} | dict(given)
        try:
            files |= {number: owned(_placeholder(directory, number)) for number in machine.disks}
            pid = spawn(machine.argv, files, printed)
        finally:
            for descriptor in (theirs, printed, given[machine.orders]):  # so that one that died is not waited for
                os.close(descriptor)
        monitor = _Monitor(pid, channel, console)
        stack.callback(monitor.end)
        yield monitor


def spawn(argv: Sequence[str], files: Mapping[int, int], printed: int) -> int:
    """Start a program with exactly these descriptors; what it says itself goes where its guest prints.

    It is killed when we die, from its first instruction on: bubblewrap sees to that a little later.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    moved = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for number, descriptor in files.items()}
    said = fcntl.fcntl(printed, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    actions: list[tuple[int, int, int]] = [(os.POSIX_SPAWN_DUP2, null, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, said, number) for number in (1, 2)]
    actions += [(os.POSIX_SPAWN_DUP2, descriptor, number) for number, descriptor in moved.items()]
    try:
        words = [_SHIM, "tied", str(os.getpid()), *argv]
        return os.posix_spawn(_SHIM, words, {"PATH": "/usr/bin:/bin"}, file_actions=actions, setsid=True)
    finally:
        for descriptor in (null, said, *moved.values()):
            os.close(descriptor)


def _placeholder(directory: str, number: int) -> int:
    """Return an empty disk, as long as any could be, that has no name any more."""
    path = f"{directory}/disk{number}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    os.ftruncate(descriptor, PLACEHOLDER_BYTES)
    return descriptor


def _keep(memory: int, path: str, size: int) -> tuple[str, int]:
    with open(path, "xb", opener=_private) as file:
        os.ftruncate(file.fileno(), size)
        found = vm_memory.copy(memory, file.fileno(), size)
        os.fsync(file.fileno())
    os.chmod(path, 0o400)
    return found


def _digest(path: str) -> tuple[str, int]:
    """Return the digest of the state, as `vm_memory.copy` counts it, and its size."""
    os.chmod(path, 0o400)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return vm_memory.digest(file.fileno(), size), size


def _write(path: str, data: bytes) -> None:
    with open(path, "xb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, 0o400)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _publish(directory: str, target: str) -> None:
    """Give it its name; what has that name is no template that could be used."""
    if os.path.lexists(target):
        remove(target)
    os.rename(directory, target)
    parent = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
