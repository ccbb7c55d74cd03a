"""How far long work on a virtual machine's disk is: one line on a terminal's standard error, gone when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.host.disk_child import Watch

AFTER_S = 1.0
"""Nothing is said of work that is shorter."""
READING = "reading the virtual machine's disk"
_WIPE = "\r\x1b[K"


def shown(what: str, *, quiet: bool) -> Callable[[], AbstractContextManager[Watch]]:
    """Return how to make the watch of work that is done in a `with` block; with `quiet` it says nothing."""
    return partial(_shown, what, quiet=quiet)


@contextmanager
def _shown(what: str, *, quiet: bool) -> Iterator[Watch]:
    from cloister.host.disk_child import Watch

    began, said = time.monotonic(), False

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - began >= AFTER_S:
            said = True
            of = f" of {total:,}" if total else ""
            sys.stderr.write(f"{_WIPE}{what}: {min(done, total or done):,}{of} files")
            sys.stderr.flush()

    try:
        yield Watch(tell if sys.stderr.isatty() and not quiet else None)
    finally:
        if said:
            sys.stderr.write(_WIPE)
            sys.stderr.flush()
