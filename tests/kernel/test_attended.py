"""Long work for one caller: told after a moment, in place, to nobody who does not look, and ended when he goes."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any

import pytest

from cloister.cli import progress
from cloister.errors import RetryError, UsageError
from cloister.host.disk_child import Watch
from cloister.runs import attended as module
from cloister.runs.attended import attended

pytestmark = pytest.mark.kernel


class Link:
    """A caller's connection that remembers what it was sent."""

    def __init__(self) -> None:
        self.closed = False
        self.sent: list[tuple[str, bytes]] = []

    def send(self, kind: str, payload: bytes = b"") -> None:
        """Remember a frame."""
        self.sent.append((kind, payload))


def work(watch: Watch, seconds: float) -> None:
    """Do something in a thread that says how far it is, until it is over or ended."""
    until, done = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        watch.check()
        done += 1
        watch.tell(min(done, 1000), 1000)
        time.sleep(0.01)


async def attend(
    link: Any, seconds: float, *, close_after: float = 60, quiet: bool = False, needed: bool = True
) -> None:
    """Have it done for a caller who goes away at some time."""
    loop = asyncio.get_running_loop()
    loop.call_later(close_after, setattr, link, "closed", True)
    async with attended(loop, link, "filling", quiet=quiet, needed=needed) as watch:
        await loop.run_in_executor(None, work, watch, seconds)


def test_who_waits_is_told_and_the_line_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of short work; of long work lines with both numbers, then an empty one, and nothing behind it."""
    monkeypatch.setattr(module, "AFTER_S", 0.2)
    link = Link()
    asyncio.run(attend(link, 0.05))
    assert link.sent == []
    asyncio.run(attend(link, 0.8))
    assert {kind for kind, _ in link.sent} == {"I"}
    assert link.sent[0][1].startswith(b"filling: ")
    assert link.sent[0][1].endswith(b" of 1,000 files")
    assert link.sent[-1] == ("I", b"")
    assert [text for _, text in link.sent].count(b"") == 1


def test_who_wants_data_only_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json there is no line, however long it takes."""
    monkeypatch.setattr(module, "AFTER_S", 0.0)
    link = Link()
    asyncio.run(attend(link, 0.5, quiet=True))
    assert link.sent == []


def test_work_for_somebody_who_went_away_is_ended() -> None:
    """Needed by him only: ended, and the start is refused. Work that others need goes on without him."""
    began = time.monotonic()
    with pytest.raises(UsageError) as refused:
        asyncio.run(attend(Link(), 30, close_after=0.2))
    assert refused.value.reference == "not-started"
    assert time.monotonic() - began < 10
    asyncio.run(attend(Link(), 0.5, close_after=0.1, needed=False))


def test_other_trouble_is_not_taken_for_a_caller_who_went() -> None:
    """A workspace that changes is one to try again, and says so."""

    async def trouble() -> None:
        async with attended(asyncio.get_running_loop(), Link(), "filling", needed=True):
            raise RetryError("workspace-changing", "it is being replaced")

    with pytest.raises(RetryError) as caught:
        asyncio.run(trouble())
    assert caught.value.reference == "workspace-changing"


def test_a_verb_says_it_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cloister diff` of a disk: a line on a terminal, which is taken away; nothing in a pipe or with --json."""
    monkeypatch.setattr(progress, "AFTER_S", 0.0)

    class Screen(io.StringIO):
        """What is shown."""

        terminal = True

        def isatty(self) -> bool:
            """Whether somebody looks."""
            return self.terminal

    for terminal, quiet, told in ((True, False, True), (True, True, False), (False, False, False)):
        screen = Screen()
        screen.terminal = terminal
        monkeypatch.setattr("sys.stderr", screen)
        with progress.shown(progress.READING, quiet=quiet)() as watch:
            watch.tell(5, 1000)
        assert bool(screen.getvalue()) is told
        assert not told or screen.getvalue().endswith("5 of 1,000 files\r\x1b[K")
