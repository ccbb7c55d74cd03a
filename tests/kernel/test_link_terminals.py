"""Terminals behind the link: the guest's line discipline is the command's, the user's terminal only shows it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator

import pytest
from keeper_rig import PTY, Keeper, Place, place_of_test

from cloister.host import frames

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)


class Terminal:
    """What the outer half does with the master of a command's terminal."""

    def __init__(self, keeper: Keeper, number: int = 0, rows: int = 24, columns: int = 80) -> None:
        self.keeper, self.number = keeper, number
        frame = keeper.frame("M", number)
        (self.master,) = frame.descriptors
        os.set_blocking(self.master, False)
        modes = termios.tcgetattr(self.master)
        modes[3] |= termios.ICANON | termios.ECHO | termios.ISIG
        modes[6][termios.VINTR] = b"\x03"
        termios.tcsetattr(self.master, termios.TCSANOW, modes)
        self.resize(rows, columns)
        self.text = b""
        keeper.channel.send("M", frames.encode_u32(number))
        keeper.until("R", number)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the window."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.master, keys)

    def until(self, text: bytes, timeout_s: float = 10) -> bytes:
        """Return what was shown up to and with `text`."""
        end = time.monotonic() + timeout_s
        while text not in self.text:
            assert time.monotonic() < end, (self.text, self.keeper.seen, self.keeper.said())
            self.read()
        seen, _, self.text = self.text.partition(text)
        return seen + text

    def read(self, timeout_s: float = 0.05) -> bool:
        """Take what is shown; False at the end of the terminal."""
        if not select.select([self.master], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.text += data
        return bool(data)

    def close(self) -> None:
        """Take the terminal away."""
        os.close(self.master)


@pytest.fixture
def keeper(place: Place) -> Iterator[Keeper]:
    """A keeper whose guest has proved its walls."""
    made = Keeper(place)
    made.begin()
    yield made
    made.close()


def test_an_agent_has_a_terminal_of_the_guests_own(keeper: Keeper) -> None:
    """ttyname(3) finds it, it is the controlling terminal, and its size is that of the user's."""
    keeper.go("/bin/sh", "-c", "tty; stty size; echo >/dev/tty through; exit 5", flags=PTY)
    terminal = Terminal(keeper, rows=31, columns=97)
    assert b"/dev/pts/" in terminal.until(b"\r\n")
    terminal.until(b"31 97\r\n")
    terminal.until(b"through\r\n")
    assert keeper.ended() == 5


def test_everything_shown_before_the_end_can_still_be_read(keeper: Keeper) -> None:
    """The last output of a command is in its user's terminal when its exit code comes."""
    keeper.go("/bin/sh", "-c", "seq 1 3000; echo last", flags=PTY)
    terminal = Terminal(keeper)
    terminal.until(b"3000\r\nlast\r\n")
    assert keeper.ended() == 0
    while terminal.read():
        pass
    assert terminal.text == b""


def test_keys_are_echoed_by_the_guest_once(keeper: Keeper) -> None:
    """The host's end of the terminal is raw: one line discipline, one echo."""
    keeper.go("/bin/sh", "-c", "read line; echo got $line", flags=PTY)
    terminal = Terminal(keeper)
    terminal.type(b"hello\r")
    assert terminal.until(b"got hello\r\n") == b"hello\r\ngot hello\r\n"
    assert keeper.ended() == 0


def test_control_c_is_a_byte_that_the_guest_makes_a_signal_of(keeper: Keeper) -> None:
    """^C interrupts the foreground job in the guest and nothing else."""
    keeper.go("/bin/sh", "-c", "trap 'echo caught' INT; echo ready; sleep 5; echo after", flags=PTY)
    terminal = Terminal(keeper)
    terminal.until(b"ready\r\n")
    terminal.type(b"\x03")
    terminal.until(b"caught\r\nafter\r\n")
    assert keeper.ended() == 0


def test_control_z_stops_the_agent_and_the_broker_learns_it(keeper: Keeper) -> None:
    """^Z stops the agent, which is told, and a continued one goes on with its terminal."""
    keeper.go("/bin/cat", flags=PTY)
    terminal = Terminal(keeper)
    terminal.type(b"one\r")
    terminal.until(b"one\r\none\r\n")
    terminal.type(b"\x1a")
    keeper.until("Z", 0)
    keeper.channel.send("S", bytes([signal.SIGCONT]))
    terminal.type(b"two\r")
    terminal.until(b"two\r\ntwo\r\n")
    terminal.type(b"\x04")
    assert keeper.ended() == 0


def test_a_raw_program_gets_every_byte_as_it_was_typed(keeper: Keeper) -> None:
    """An editor sets its own modes in the guest: control characters, escapes and UTF-8 reach it unchanged, and back."""
    keeper.go("/bin/sh", "-c", "stty raw -echo; echo ready; head -c 12 | od -An -tx1; printf '\\033[2Jdone'", flags=PTY)
    terminal = Terminal(keeper)
    terminal.until(b"ready\n")
    terminal.type(b"\x03\x1a\x04\r\n\x1b[A\xc3\xa9\x11\x13")
    terminal.until(b"03 1a 04 0d 0a 1b 5b 41 c3 a9 11 13")
    terminal.until(b"\x1b[2Jdone")
    assert keeper.ended() == 0


def test_the_window_is_followed(keeper: Keeper) -> None:
    """A new size arrives with SIGWINCH; a redraw at the same size does too."""
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    keeper.go("/bin/sh", "-c", script, flags=PTY)
    terminal = Terminal(keeper)
    terminal.until(b"ready\r\n")
    terminal.resize(40, 120)
    terminal.until(b"40 120\r\n")
    terminal.resize(39, 120)
    terminal.resize(40, 120)
    terminal.until(b"40 120\r\n")


def test_a_terminal_that_closes_hangs_up_on_its_program(keeper: Keeper) -> None:
    """A user whose terminal is gone: the agent gets SIGHUP from the guest's kernel."""
    keeper.go("/bin/sleep", "60", flags=PTY)
    terminal = Terminal(keeper)
    terminal.close()
    assert keeper.ended() == 128 + signal.SIGHUP


def test_a_program_that_closes_its_terminal_closes_the_users(keeper: Keeper) -> None:
    """When nobody in the guest holds the terminal any more its user's end reads as ended."""
    keeper.go("/bin/sleep", "60", flags=PTY)
    agent = Terminal(keeper)
    keeper.execute(1, "/bin/sh", "-c", "exec </dev/null >/dev/null 2>&1; sleep 60", flags=PTY)
    terminal = Terminal(keeper, 1)
    end = time.monotonic() + 10
    while terminal.read() and time.monotonic() < end:
        pass
    assert time.monotonic() < end
    keeper.channel.send("S", bytes([signal.SIGTERM]) + frames.encode_u32(1))
    assert keeper.ended(1) == 128 + signal.SIGTERM
    agent.close()


def test_many_terminals_are_apart(keeper: Keeper) -> None:
    """Each command with a terminal has one of its own, with its own size."""
    keeper.go("/bin/sleep", "60", flags=PTY)
    agent = Terminal(keeper)
    for number in range(1, 9):
        keeper.execute(number, "/bin/sh", "-c", "stty size; cat", flags=PTY)
    terminals = [Terminal(keeper, number, rows=20 + number) for number in range(1, 9)]
    for terminal in terminals:
        terminal.until(b"%d 80\r\n" % (20 + terminal.number))
        terminal.type(b"%d\r" % terminal.number)
        terminal.until(b"%d\r\n%d\r\n" % (terminal.number, terminal.number))
        terminal.type(b"\x04")
        assert keeper.ended(terminal.number) == 0
    agent.close()


def test_a_command_that_waits_for_its_terminal_can_be_ended(keeper: Keeper) -> None:
    """A signal before the outer half has the terminal ends the command: nothing waits for ever."""
    keeper.go("/bin/sleep", "60", flags=PTY)
    keeper.frame("M", 0)
    keeper.channel.send("S", bytes([signal.SIGTERM]))
    assert keeper.ended() == 128 + signal.SIGTERM


def test_bulk_output_on_a_terminal_is_complete(keeper: Keeper) -> None:
    """Megabytes through a terminal arrive whole, at the pace of the reader."""
    keeper.go("/bin/sh", "-c", "stty -opost; head -c 3000000 /dev/zero | tr '\\0' x; echo; echo end", flags=PTY)
    terminal = Terminal(keeper)
    assert terminal.until(b"end\n", 30).count(b"x") == 3_000_000
    assert keeper.ended() == 0
