"""Long work on a machine's disk, done by a child of this process.

So it neither holds up what this process does besides nor shares its memory with what parses a guest's bytes. The child
(`child_start`, `child_main`, `disk_work`) ends with this process, gets a request in memory and descriptors, and answers
in lines of JSON: how far it is, then a result or an error. What it says is not trusted further than that it may be
shown.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from cloister.errors import CloisterError, DeniedError, RetryError, StepError, UnsupportedError, UsageError
from cloister.host.child_start import Child, Spares

SILENCE_S = 600.0
"""A child that reads a guest's bytes says at least that often how far it is, or it is ended."""
_WORK = "cloister.host.disk_work"
_LINE_BYTES = 1 << 20
_LOOK_S = 0.05
_ERRORS: dict[str, type[CloisterError]] = {
    one.__name__: one for one in (DeniedError, RetryError, StepError, UnsupportedError, UsageError)
}
_Answer = TypeVar("_Answer")


class Watch:
    """Who waits for long work: he is told how far it is, and may end it from any thread."""

    def __init__(self, told: Callable[[int, int], None] | None = None, spares: Spares | None = None) -> None:
        """Take what is called, in the thread that waits, with how many files are done and how many there are.

        Where he has children that wait for work already, one of those does it.
        """
        self._told = told
        self.spares = spares
        self._over = threading.Event()

    def cancel(self) -> None:
        """End the work: it leaves nothing, and whoever waits for it gets a `RetryError`."""
        self._over.set()

    def check(self) -> None:
        """Return while the work is wanted.

        Raises:
            RetryError: it is not any more.
        """
        if self._over.is_set():
            raise RetryError("disk-interrupted", "the work on the virtual machine's disk was ended before it was done")

    def tell(self, done: int, total: int) -> None:
        """Say how far the work is."""
        if self._told:
            self._told(done, total)


def in_child(  # noqa: PLR0913  # a request, and who waits for it
    work: str, request: Mapping[str, Any], answer: type[_Answer], *, descriptors: Mapping[str, int],
    watch: Watch | None = None, silence_s: float | None = None, started: Callable[[], None] = lambda: None,
    program: str = _WORK,
) -> _Answer:  # fmt: skip
    """Have `disk_work` do something; return its answer.

    Args:
        work: which of the program's works.
        request: plain data, for JSON.
        answer: what the answer looks like.
        descriptors: those that it gets, by a name that it knows.
        watch: who is told how far it is, and may end it.
        silence_s: end it when it says nothing for so long.
        program: the module that does it, by name: one of a room above can be.
        started: called when it has its descriptors, or never will.

    Raises:
        CloisterError: it said so; or it was ended, or has died. What it left is for the caller to remove.
    """
    watch = watch or Watch()
    order = {"program": program, "work": work, "descriptors": list(descriptors), **request}
    try:
        child = (watch.spares and watch.spares.take()) or Child((program,))
        child.give(json.dumps(order).encode("ascii"), tuple(descriptors.values()))
        process = child.process
    except OSError as error:
        raise StepError("vm-disk-child", f"the work on the disk cannot be started: {error.strerror}") from error
    finally:
        started()
    with process:
        try:
            for line in _lines(process, watch, silence_s):
                told = _read(line)
                if "done" in told:
                    watch.tell(int(told["done"]), int(told["total"]))
                elif "error" in told:
                    raise _error(told["error"])
                else:
                    return msgspec.convert(told.get("answer"), answer)
        except (ValueError, TypeError, KeyError) as error:  # msgspec.ValidationError is a ValueError
            raise StepError("vm-disk-child", "what works on the disk said something that it should not") from error
        finally:
            with suppress(ProcessLookupError):
                process.kill()
    raise _died(process.returncode)


def _lines(process: subprocess.Popen[bytes], watch: Watch, silence_s: float | None) -> Iterator[bytes]:
    """Yield what it says, line by line, until it says nothing more.

    Raises:
        CloisterError: the watch has ended it, it is silent for too long, or a line has no end.
    """
    assert process.stdout is not None  # noqa: S101  # it is a pipe
    waiting, heard = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            watch.check()
            if not selector.select(_LOOK_S):
                if silence_s is not None and time.monotonic() - heard > silence_s:
                    raise StepError("vm-disk-child", f"what works on the disk was silent for {silence_s:g} s")
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return
            heard = time.monotonic()
            *lines, waiting = (waiting + data).split(b"\n")
            if len(waiting) > _LINE_BYTES:
                raise StepError("vm-disk-child", "what works on the disk says a line without an end")
            yield from lines


def _read(line: bytes) -> dict[str, Any]:
    told = json.loads(line)
    if not isinstance(told, dict):
        raise TypeError
    return told


def _error(told: dict[str, str]) -> CloisterError:
    reference, message, where, remedy = (str(told[name]) for name in ("reference", "message", "where", "remedy"))
    return _ERRORS.get(told["kind"], StepError)(reference, message, where=where, remedy=remedy)


def _died(code: int) -> StepError:
    how = f"by signal {-code}" if code < 0 else f"with {code}"
    return StepError("vm-disk-child", f"what works on the disk has ended {how} before it was done", remedy="try again")
