"""Long work of the broker for one caller: who waits on a terminal sees how far it is; where nobody waits, it ends.

The work is in a thread that has a `Watch`; the caller's connection belongs to the event loop. Frames `I` are shown by
the outer half where its standard error is a terminal, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from cloister.errors import RetryError, UsageError
from cloister.host.child_start import Spares
from cloister.host.disk_child import Watch

AFTER_S = 1.0
"""Nothing is said of work that is shorter."""
_EVERY_S = 0.2
_LOOK_S = 0.1


@contextlib.asynccontextmanager
async def attended(  # noqa: PLR0913  # a caller, and what is done for him
    loop: asyncio.AbstractEventLoop, link: Any, what: str, *, quiet: bool = False, needed: bool = False,
    spares: Spares | None = None,
) -> AsyncIterator[Watch]:  # fmt: skip
    """Yield the watch of work that is done in a `with` block, by a thread.

    Args:
        loop: the link's.
        link: the caller.
        what: what is being done, in a few words.
        quiet: say nothing.
        needed: the work is for the caller only: it is ended when he goes.
        spares: children that wait for such work.

    Raises:
        UsageError: `not-started`: he went, and the work was ended.
    """
    told = _Told(loop, link, what)
    watch = Watch(None if quiet else told.tell, spares)
    look = _Look(loop, link, watch)
    if needed:
        look.again()
    try:
        yield watch
    except RetryError:
        if needed and link.closed:
            raise UsageError("not-started", "whoever asked for the run went away before it started") from None
        raise
    finally:
        look.over()
        told.over()


class _Look:
    """Looks now and then whether a caller is still there; he may be anybody's by now, so nobody is asked to tell."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: Any, watch: Watch) -> None:
        self._loop, self._link, self._watch = loop, link, watch
        self._next: asyncio.TimerHandle | None = None

    def again(self) -> None:
        """Look, and end the work where nobody waits for it."""
        if self._link.closed:
            self._watch.cancel()
        else:
            self._next = self._loop.call_later(_LOOK_S, self.again)

    def over(self) -> None:
        """Look no more."""
        if self._next:
            self._next.cancel()


class _Told:
    """What a caller was told."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: Any, what: str) -> None:
        self._loop, self._link, self._what = loop, link, what
        self._next = time.monotonic() + AFTER_S
        self._shown = self._over = False

    def tell(self, done: int, total: int) -> None:
        """Hear of it, in the thread that works."""
        now = time.monotonic()
        if now >= self._next and total:
            self._next = now + _EVERY_S
            self._loop.call_soon_threadsafe(self._say, f"{self._what}: {min(done, total):,} of {total:,} files")

    def _say(self, text: str) -> None:
        if not self._over:
            self._shown = True
            self._link.send("I", text.encode("ascii", "replace"))

    def over(self) -> None:
        """Take it away; nothing comes after that."""
        self._over = True
        if self._shown:
            self._link.send("I")
