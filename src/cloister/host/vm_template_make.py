"""Making a template: boot a guest to where it waits for its orders, stop it, keep its memory and its devices' state.

Before it gets its name another machine is started from it: what cannot do that is no template, whatever the monitor
and this host's processor say. The guest is told nothing: no entropy, no name, no file of a run. The maker may be
killed at any point: the monitor dies with it, what it wrote has another name than templates have. How a monitor is
asked for all that is a `Maker`'s: `vm_template_qemu`, `vm_template_firecracker`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Protocol

import msgspec

from cloister.errors import RetryError, StepError
from cloister.host import private_files, vm_memory
from cloister.host.vm_template import MAKING, find, remove, tidy
from cloister.plan.vm_template import MEMORY, RECORD, STATE, Shape, Template

SETTLE_S = 0.3
"""Time in which a guest may finish what it put off while it booted."""
_MIB = 1 << 20


class Maker(Protocol):
    """What is different for each monitor."""

    def write(self, directory: str, state: str, memory: int, settle_s: float) -> tuple[tuple[str, ...], float]:
        """Boot a guest, hold it, write it down, end it; return its hello, and the seconds until it came.

        Args:
            directory: where placeholders may be made.
            state: path of the file for the state of its devices, to be made.
            memory: an open file of zeroes, as large as the guest's memory, for that.
            settle_s: how long the guest may tidy up after its boot.

        Raises:
            StepError: the guest does not come up, or the monitor fails.
        """

    def rehearse(self, directory: str, state: str, memory: int) -> tuple[str, ...]:
        """Start a machine from what was written, end it, and return its hello.

        Raises:
            StepError: it does not come up.
        """


def making_directory(root: str, shape: Shape) -> str:
    """Return the directory in which the template of a shape is made."""
    return f"{root}/{MAKING}{shape.key()}"


def make(root: str, shape: Shape, maker: Maker, *, settle_s: float = SETTLE_S) -> Template:
    """Make the template of a shape, or return the one that another process has made meanwhile. Takes seconds.

    Args:
        root: the directory of templates; made where it is missing.
        shape: what it is for.
        maker: starts its monitors.
        settle_s: how long the guest may tidy up after its boot.

    Raises:
        RetryError: another process is making it.
        StepError: the guest does not come up, or the monitor fails.
    """
    os.makedirs(root, mode=0o700, exist_ok=True)
    tidy(root)
    directory = making_directory(root, shape)
    lock = _lock(directory)
    published = False
    try:
        template = find(root, shape)
        if template is None:
            with _memory_of(shape) as memory:
                template = _written(directory, shape, maker, memory, settle_s)
                if maker.rehearse(directory, f"{directory}/{STATE}", memory) != template.hello:
                    raise StepError("template-failed", "a machine from the template says that it is another one")
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


def _written(directory: str, shape: Shape, maker: Maker, memory: int, settle_s: float) -> Template:
    """Have a guest's files written; return the record, which is written as well."""
    words, boot_s = maker.write(directory, f"{directory}/{STATE}", memory, settle_s)
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


def _keep(memory: int, path: str, size: int) -> tuple[str, int]:
    with open(path, "xb", opener=private_files.opener) as file:
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
    with open(path, "xb", opener=private_files.opener) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, 0o400)


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
