"""Templates of virtual machines on the disk: found by their shape, verified before use, held as sealed copies.

    templates/KEY/record.json   what it was made for, and the digests of the two others; 0400, as they are
    templates/KEY/memory        the guest's memory, sparse
    templates/KEY/state         the state of its devices
    templates/.making-KEY/      one that is being made; locked by who makes it, else a leftover

Written as a whole and renamed into place. They hold no secret: a template is a guest that was told nothing yet. What
its kernel has drawn at random before is in all its clones: see docs/microvm.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
from collections.abc import Iterator

import msgspec

from cloister.errors import StepError
from cloister.host import private_files, qmp, removal, vm_memory
from cloister.plan.vm_template import MEMORY, RECORD, STATE, Shape, Template

MAKING = ".making-"
_MAX_RECORD = 1 << 20
_KEEP = 8
"""Templates of one user: each is some 100 MB."""
_KEEP_BYTES = 2 << 30
"""What they may take of the disk together."""


class Held:
    """One verified template, for monitors to start from. Owns its descriptors until nobody uses it."""

    def __init__(self, template: Template, memory: int, state: int) -> None:
        """Keep the sealed copies."""
        self.template = template
        self.memory = memory
        self._state = state
        self.users = 0

    def state(self) -> int:
        """Return a descriptor of the state with a place of its own; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._state}", os.O_RDONLY | os.O_CLOEXEC)

    def orders(self, number: int) -> tuple[int, int]:
        """Return what makes a monitor load the state, and its other end, to be kept open while the monitor lives.

        Args:
            number: the descriptor under which the monitor has the state.
        """
        return qmp.restore_orders(number, shared=True)

    def _close(self) -> None:
        os.close(self.memory)
        os.close(self._state)


class Holder:
    """The templates that this process has verified. The one used last is kept: the next start finds it at hand."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._held: dict[str, Held] = {}
        self._last = ""
        self._lock = threading.Lock()

    def hold(self, directory: str, digest: str) -> Held:
        """Return a template; call `release` when its monitor is over. Slow the first time: everything is hashed.

        Args:
            directory: of the template.
            digest: of its record, as the plan has it.

        Raises:
            StepError: `template-changed`: it is not what the plan names. It has been removed.
        """
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                held = self._held[digest] = _verified(directory, digest)
            held.users += 1
            self._last = digest
            self._drop()
        with contextlib.suppress(OSError):
            os.utime(directory)
        return held

    def release(self, held: Held) -> None:
        """Give one back."""
        with self._lock:
            held.users -= 1
            self._drop()

    def close(self) -> None:
        """Give back what nobody uses."""
        with self._lock:
            self._last = ""
            self._drop()

    def _drop(self) -> None:
        for digest, held in list(self._held.items()):
            if held.users <= 0 and digest != self._last:
                del self._held[digest]
                held._close()  # noqa: SLF001  # of this module


def find(root: str, shape: Shape) -> Template | None:
    """Return the record of the template for a shape; None where there is none that could be used.

    Cheap: the files are looked at, not read. Whoever starts from it holds it first.
    """
    template = read(f"{root}/{shape.key()}")
    return template if template is not None and template.shape == shape else None


def read(directory: str) -> Template | None:
    """Return the record of a directory; None where that is no template that could be used."""
    try:
        template = msgspec.json.decode(private_files.read(f"{directory}/{RECORD}", _MAX_RECORD) or b"", type=Template)
    except msgspec.DecodeError:
        return None
    right = _plain(f"{directory}/{MEMORY}", template.memory_bytes)
    return template if right and _plain(f"{directory}/{STATE}", template.state_bytes) else None


def every(root: str) -> Iterator[tuple[str, Template | None]]:
    """Yield the directories of all templates, and their records; None for one that cannot be used."""
    for name in sorted(_names(root)):
        if not name.startswith("."):
            template = read(f"{root}/{name}")
            yield f"{root}/{name}", template if template is not None and template.shape.key() == name else None


def tidy(root: str, *, newer: Shape | None = None) -> list[str]:
    """Remove leftovers of makers that died, unusable templates, and those too many; return what went.

    Too many are those beyond eight, or beyond 2 GiB on the disk: who was not started from the longest goes first, and
    the one that was used last stays, however large it is.

    Args:
        root: the directory of templates.
        newer: also remove those of the same image, monitor, size and accelerator that were made for something older.
    """
    started = [f"{root}/{name}" for name in _names(root) if name.startswith(MAKING)]
    gone = [path for path in started if abandoned(path)]
    usable = []
    for path, template in every(root):
        if template is None or (newer and template.shape != newer and _same_purpose(template.shape, newer)):
            gone.append(path)
        else:
            usable.append((_used(path), path))
    gone += _beyond([path for _, path in sorted(usable, reverse=True)])
    for path in gone:
        remove(path)
    return gone


def _beyond(paths: list[str]) -> Iterator[str]:
    """Yield what is too much of templates that are named from the one used last to the one used first."""
    total = 0
    for count, path in enumerate(paths):
        total += stored(path)
        if count and (count >= _KEEP or total > _KEEP_BYTES):
            yield path


def stored(directory: str) -> int:
    """Return what a template or snapshot takes of the disk, in bytes."""
    try:
        return sum(os.lstat(f"{directory}/{name}").st_blocks * 512 for name in os.listdir(directory))
    except OSError:
        return 0


def remove(directory: str) -> None:
    """Remove one template, or what is left of one: its record first, so that half of it is never taken for it."""
    with contextlib.suppress(OSError):
        os.unlink(f"{directory}/{RECORD}")
    removal.sweep(directory)


def _names(root: str) -> list[str]:
    try:
        return os.listdir(root)
    except OSError:
        return []


def _used(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _same_purpose(one: Shape, other: Shape) -> bool:
    def purpose(shape: Shape) -> tuple[str, str, str, int, int, bool]:
        monitor = shape.program.partition(" ")[0]
        return shape.image, monitor, shape.accelerator, shape.memory_mib, shape.cpus, shape.card

    return purpose(one) == purpose(other)


def abandoned(path: str) -> bool:
    """Tell whether nobody holds the lock of one that is being made."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _plain(path: str, size: int) -> bool:
    """Tell whether a file is this user's own, of this size, and nobody else could have read or changed it."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    own = stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o277
    return own and info.st_size == size


def _verified(directory: str, digest: str) -> Held:
    template = read(directory)
    if template is None or template.digest() != digest:
        raise _changed(directory, "its record is another one")
    parts = ((MEMORY, template.memory, template.memory_bytes), (STATE, template.state, template.state_bytes))
    copies: list[int] = []
    try:
        for name, right, size in parts:
            copies.append(vm_memory.sealed(f"{directory}/{name}", right, size))
    except OSError as error:
        for descriptor in copies:
            os.close(descriptor)
        raise _changed(directory, error.strerror or str(error)) from None
    return Held(template, copies[0], copies[1])


def _changed(directory: str, why: str) -> StepError:
    remove(directory)
    return StepError(
        "template-changed", f"the machine's template is not what it was: {why}; it has been removed",
        where=directory, remedy="the same again: it boots cold, and a new template is made",
    )  # fmt: skip
