"""What every child of `disk_child` does around its work: takes the request, says how far it is, answers, and leaves.

    stdin   a socket: one message, with a file that has the request as JSON (which work of which module, its arguments,
            names of descriptors) and those descriptors
    stdout  lines of JSON: {"done": 1, "total": 2} now and then, at last {"answer": …} or {"error": {…}}

A module has its works as `WORKS`.

All is imported here before the work begins: it may take away what imports need.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import msgspec

from cloister.errors import CloisterError, StepError

Tell: TypeAlias = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""
Work: TypeAlias = Callable[[dict[str, Any], Tell], object]
_EVERY_S = 0.25
_DESCRIPTORS = 16


def main(modules: Sequence[str]) -> NoReturn:
    """Import modules, wait for the request, do what it says, and leave."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in modules:
        importlib.import_module(name)
    order = _order()
    try:
        work: Work = importlib.import_module(order["program"]).WORKS[order["work"]]
        _say({"answer": msgspec.to_builtins(work(order, _teller()))})
    except CloisterError as error:
        parts = {name: getattr(error, name) for name in ("reference", "message", "where", "remedy")}
        kind = next(one.__name__ for one in type(error).__mro__ if one.__module__ == CloisterError.__module__)
        _say({"error": {"kind": kind, **parts}})
    except MemoryError:
        _failed("it needs more memory than it may have")
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent is to hear of it
        _failed(f"{type(error).__name__}: {error}")
    os._exit(0)  # nothing of this process is needed any more, and a confined one cannot tidy up


def _order() -> dict[str, Any]:
    """Wait for the request. Whoever made this process may have no work for it: it leaves then."""
    with socket.socket(fileno=0) as asked:
        told, received, _, _ = socket.recv_fds(asked, 1, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    if not told:
        os._exit(0)
    os.open("/dev/null", os.O_RDONLY)  # the lowest number is free: what is opened later is not taken for stdin
    with open(received[0], "rb") as file:
        order: dict[str, Any] = json.load(file)
    order["descriptors"] = dict(zip(order["descriptors"], received[1:], strict=True))
    return order


def _failed(why: str) -> None:
    parts = {"reference": "vm-disk-child", "message": f"the work on the disk has failed: {why}"}
    _say({"error": {"kind": StepError.__name__, "where": "", "remedy": "cloister doctor", **parts}})


def _say(told: dict[str, Any]) -> None:
    left = memoryview(json.dumps(told).encode("ascii") + b"\n")
    while left:
        left = left[os.write(1, left) :]


def _teller() -> Tell:
    """Return what says how far the work is, not more often than anybody could read."""
    said = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _EVERY_S:
            said = now
            _say({"done": done, "total": total})

    return tell
