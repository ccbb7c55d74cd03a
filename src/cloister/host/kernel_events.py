"""The reader of kernel events: what waits in the sensor's rings becomes lines of the log.

It needs descriptors, no privilege.

All work per event is C's (`native/reader.c`), without Python's lock. Lines come in batches: `take` returns one, the
keeper writes it, and only `commit` takes its records from the rings. So a keeper that is killed in between finds
the same records again; they may then stand in the log twice, never not at all.

Not here: loading and attaching (`kernel_programs`), and which run a watch belongs to (`Reader.name` is told).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cloister.errors import StepError

BATCH_BYTES = 1 << 20
"""Lines of one batch at most."""
TYPES = {"executed": 1, "forked": 2, "exited": 3, "connected": 4, "sent": 5, "bound": 6, "called": 7, "file": 8,
         "privilege": 9, "traced": 10, "kernel": 11, "ring": 12}  # fmt: skip
"""Event types by the words of `Reader.tee`."""


class Batch(NamedTuple):
    """Lines of the log."""

    lines: memoryview
    """Valid until the next `take`."""
    seq: int
    """The number of the last line; that of before where there is none."""
    hash: bytes
    stranger: int
    """The watch whose event ended the batch, because nobody named it yet; 0 for none."""


class Counts(NamedTuple):
    """What went through a reader, of the critical and the bulk ring."""

    delivered: tuple[int, int]
    missing: tuple[int, int]
    """Sequence numbers that never came: lost between two that came."""


class Call(NamedTuple):
    """How a system call's event is written; see `audit/calls.toml`."""

    number: int
    name: str
    kind: str = "kernel.invoked"
    severity: int = 1
    shape: int = 0
    flags_at: int = 255


def _native() -> tuple[Any, Any]:
    """Return the extension's `ffi` and `lib`, where it was built."""
    module = importlib.import_module("cloister.host._audit")
    return module.ffi, module.lib


def missing() -> str:
    """Return why there is no reader, or nothing."""
    try:
        _native()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cloister.host._audit":
            return "this installation was built without kernel events"
        return f"the reader of kernel events does not load: {error}"
    return ""


def boot_id() -> bytes:
    """Return the id of this boot, 16 bytes (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def chain_lines(objects: bytes, seq: int, previous: bytes) -> tuple[bytes, int, bytes]:
    """Make lines of JSON objects, one each line: the same as `audit.chain` does, in C. Returns lines, seq and hash.

    Raises:
        ValueError: one of them is no JSON object.
    """
    ffi, lib = _native()
    room = len(objects) + 128 * (objects.count(b"\n") + 1)
    out = ffi.new("char[]", room)
    number, digest = ffi.new("uint64_t *", seq), ffi.new("uint8_t[32]", previous)
    length = lib.chain_lines(objects, len(objects), number, digest, out, room)
    if length < 0:
        raise ValueError(os.strerror(-length))
    return bytes(ffi.buffer(out, length)), int(number[0]), bytes(ffi.buffer(digest))


class Reader:
    """One reader of two rings. There must be only one per sensor; not for several threads at once."""

    def __init__(self, critical: int, bulk: int, sizes: tuple[int, int], boot: bytes) -> None:
        """Map the rings; the descriptors may be closed afterwards. -1 is a ring that is not there.

        Raises:
            StepError: there is no reader here, or the descriptors are no rings of these sizes.
        """
        why = missing()
        if why:
            raise StepError("kernel-events-unavailable", why, remedy="cloister doctor")
        self._ffi, self._lib = _native()
        self._reader = self._lib.reader_open(critical, sizes[0], bulk, sizes[1], boot)
        if self._reader == self._ffi.NULL:
            message = f"the rings of kernel events cannot be mapped: {os.strerror(self._ffi.errno)}"
            raise StepError("kernel-rings-unreadable", message)
        self._out = self._ffi.new("char[]", BATCH_BYTES)
        self._seq, self._hash = self._ffi.new("uint64_t *"), self._ffi.new("uint8_t[32]")

    def name(self, watch: int, fields: Mapping[str, str]) -> None:
        """Say what stands in the events of a watch: `run`, `agent`, `user`, `account`; call it before they come.

        Raises:
            StepError: too many watches, or too long words.
        """
        text = msgspec.json.encode({key: value for key, value in fields.items() if value})[1:-1]
        words = text + b"," if text else b""
        if self._lib.reader_watch(self._reader, watch, words, len(words)) < 0:
            raise StepError("kernel-watch-refused", "too many runs are watched, or a run's words are too long")

    def forget(self, watch: int) -> None:
        """A watch is over, and its last event was taken."""
        self._lib.reader_forget(self._reader, watch)

    def describe(self, calls: Sequence[Call]) -> None:
        """Say how system calls are written."""
        for one in calls:
            self._lib.reader_call(self._reader, one.number, one.name.encode(), one.kind.encode(), one.severity,
                                  one.shape, one.flags_at)  # fmt: skip

    def tee(self, types: Sequence[str]) -> None:
        """Copy lines of these types (`TYPES`), for who looks at them as they come (`teed`)."""
        self._lib.reader_tee(self._reader, sum(1 << TYPES[one] for one in types))

    def take(self, seq: int, previous: bytes, *, strangers: bool = False) -> Batch:
        """Return the next lines after line `seq` with hash `previous`; none when nothing waits.

        With `strangers`, events of watches that nobody named come too, without a run.
        """
        self._seq[0] = seq
        self._ffi.memmove(self._hash, previous, 32)
        length = self._lib.reader_take(self._reader, self._seq, self._hash, self._out, BATCH_BYTES, int(strangers))
        return Batch(memoryview(self._ffi.buffer(self._out, length)), int(self._seq[0]),
                     bytes(self._ffi.buffer(self._hash)), int(self._lib.reader_stranger(self._reader)))  # fmt: skip

    def commit(self) -> None:
        """The last batch is written: its records leave the rings."""
        self._lib.reader_commit(self._reader)

    def teed(self) -> bytes:
        """Return the lines of the last batch that `tee` asked for."""
        length = self._ffi.new("size_t *")
        text = self._lib.reader_teed(self._reader, length)
        return bytes(self._ffi.buffer(text, length[0]))

    @property
    def waiting(self) -> int:
        """Bytes in the rings."""
        return int(self._lib.reader_waiting(self._reader))

    def counts(self) -> Counts:
        """Return what was delivered, and what is missing by its number."""
        delivered, lost = self._ffi.new("uint64_t[2]"), self._ffi.new("uint64_t[2]")
        self._lib.reader_counts(self._reader, delivered, lost)
        return Counts((int(delivered[0]), int(delivered[1])), (int(lost[0]), int(lost[1])))

    def format(self, record: bytes) -> bytes:
        """Return the JSON of one record, for tests."""
        room = (1 << 16) + 4096
        out = self._ffi.new("char[]", room)
        length = self._lib.reader_format(self._reader, record, len(record), out, room)
        if length < 0:
            raise ValueError(os.strerror(-length))
        return bytes(self._ffi.buffer(out, length))

    def close(self) -> None:
        """Unmap the rings. May be called twice."""
        if self._reader != self._ffi.NULL:
            self._lib.reader_close(self._reader)
            self._reader = self._ffi.NULL
