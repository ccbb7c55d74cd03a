"""How far long work is: one line on the caller's terminal, gone before anything else is shown; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shim_rig import Rig, Run, rig_of_test
from test_shim_pty import Terminal, question

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)
WIPE = b"\r\x1b[K"


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """One terminal."""
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_line_replaces_the_last_and_goes(rig: Rig, terminal: Terminal) -> None:
    """Each line takes the place of the one before, without control characters and not too long; F takes it away."""
    run = Run(rig, launch=False, **terminal.popen())
    run.outer.send("I", b"filling: 1 of 9 files")
    assert terminal.until(run, b"1 of 9 files") == b"filling: 1 of 9 files"
    run.outer.send("I", b"filling: \x1b[2J2 of 9" + b"x" * 100)
    shown = terminal.until(run, b"x" * 60)
    assert shown.startswith(WIPE + b"filling: ?[2J2 of 9x")
    run.outer.send("I")
    run.outer.send("I")
    run.outer.send("Q", question(b"sure?"))
    rest = terminal.until(run, b"sure?")
    assert rest.endswith(WIPE + b"sure?")
    assert rest.count(WIPE) == 1
    run.outer.send("I", b"reading")
    terminal.until(run, b"reading")
    run.outer.send("F", b"\0over\n")
    assert run.process.wait(5) == 0
    assert WIPE in terminal.until(run, b"over\r\n")
    assert terminal.restored()
    run.close()


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_ends_the_wait_and_the_line(rig: Rig, terminal: Terminal, number: int) -> None:
    """Before anything runs Ctrl-C is the end of it: the broker sees that nobody waits any more."""
    run = Run(rig, launch=False, **terminal.popen())
    run.outer.send("I", b"filling")
    terminal.until(run, b"filling")
    run.process.send_signal(number)
    assert run.process.wait(5) == 128 + number
    terminal.until(run, WIPE)
    run.close()


def test_without_a_terminal_nothing_is_said(rig: Rig) -> None:
    """A pipe gets no line of progress, and no bytes that take one away."""
    run = Run(rig, launch=False, start_new_session=True)
    run.outer.send("I", b"filling")
    run.outer.send("I")
    run.outer.send("F", b"\0over\n")
    out, err = run.process.communicate(timeout=5)
    assert (out, err) == (b"", b"over\n")
    run.close()
