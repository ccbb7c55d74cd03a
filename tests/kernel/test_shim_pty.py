"""With a terminal the agent gets a pty of its own: size, keys, job control, questions, and a restored terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest
from shim_rig import PTY, Rig, Run, as_user, rig_of_test

from cloister.host import frames

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)


class Terminal:
    """The user's terminal: we are the emulator, the outer half is the foreground program of its session."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        os.fchmod(self.slave, 0o666)
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.slave)
        self.text = b""

    def popen(self) -> dict[str, object]:
        """Popen arguments that put a child into this terminal."""
        return {
            "stdin": self.slave, "stdout": self.slave, "stderr": self.slave, "start_new_session": True,
            "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **as_user(),
        }  # fmt: skip

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the window."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.master, keys)

    def until(self, run: Run, text: bytes, timeout_s: float = 10) -> bytes:
        """Show output until `text` was seen; return what came up to its end."""
        end = time.monotonic() + timeout_s
        while text not in self.text:
            assert time.monotonic() < end, (self.text, run.seen, run.probe)
            run.turn(0.02)
            while select.select([self.master], [], [], 0.02)[0]:
                self.text += os.read(self.master, 65536)
        seen, _, self.text = self.text.partition(text)
        return seen + text

    def restored(self) -> bool:
        """Return whether the modes are those before the run."""
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        """Take the terminal away."""
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """One terminal."""
    terminal = Terminal()
    yield terminal
    terminal.close()


def start(rig: Rig, terminal: Terminal, *command: str, **options: object) -> Run:
    """Start a command on a pty."""
    run = Run(rig, flags=PTY, **{**terminal.popen(), **options})
    run.go(*command)
    return run


def test_the_agent_has_a_terminal_of_the_same_size(rig: Rig, terminal: Terminal) -> None:
    """All three descriptors are a terminal, the controlling one, of the user's size; it is not the user's."""
    run = start(rig, terminal, "sh", "-c", "test -t 0 -a -t 1 -a -t 2 && stty size && stty size </dev/tty; exit 3")
    assert terminal.until(run, b"24 80\r\n24 80\r\n")
    assert run.wait() == 3
    assert terminal.restored()
    run.close()


def test_a_resize_reaches_the_agent(rig: Rig, terminal: Terminal) -> None:
    """When the user's window changes, the agent gets SIGWINCH and sees the new size."""
    run = start(rig, terminal, "sh", "-c", "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.05; done")
    terminal.until(run, b"up\r\n")
    terminal.resize(50, 132)
    terminal.until(run, b"50 132\r\n")
    assert run.wait() == 0
    run.close()


def test_ctrl_c_interrupts_the_agent_not_us(rig: Rig, terminal: Terminal) -> None:
    """The byte travels through the pty: the agent's foreground group is interrupted, and ends with 130."""
    run = start(rig, terminal, "sh", "-c", "trap 'echo caught' INT; echo up; sleep 5; echo on; exec sleep 60")
    terminal.until(run, b"up\r\n")
    terminal.type(b"\x03")
    terminal.until(run, b"caught\r\non\r\n")
    assert run.process.poll() is None
    time.sleep(0.2)
    terminal.type(b"\x03")
    assert run.wait() == 130
    assert terminal.restored()
    run.close()


def test_ctrl_z_stops_and_fg_continues(rig: Rig, terminal: Terminal) -> None:
    """Ctrl-Z stops agent and us with the terminal restored; continuing sets it up again and goes on."""
    run = start(rig, terminal, "sh", "-c", "echo up; sleep 0.5; stty size; read x; echo got $x; exit 8")
    terminal.until(run, b"up\r\n")
    terminal.type(b"\x1a")
    run.until("inner", "Z")
    _, status = os.waitpid(run.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert terminal.restored()
    terminal.resize(30, 90)
    run.process.send_signal(signal.SIGCONT)
    run.until("outer", "C")
    terminal.until(run, b"30 90\r\n")
    assert not terminal.restored()
    terminal.type(b"word\r")
    terminal.until(run, b"got word\r\n")
    assert run.wait() == 8
    assert terminal.restored()
    run.close()


def test_a_shell_keeps_its_own_job_control(rig: Rig, terminal: Terminal) -> None:
    """In an interactive shell Ctrl-Z stops the shell's job; the run itself goes on."""
    run = start(rig, terminal, "bash", "--norc", "--noediting", "-i")
    run.until("inner", "R")
    terminal.type(b"sleep 60\r")
    terminal.until(run, b"sleep 60\r\n")
    time.sleep(0.2)
    terminal.type(b"\x1a")
    terminal.until(run, b"Stopped")
    terminal.type(b"fg\r")
    terminal.until(run, b"fg\r\nsleep 60\r\n")
    time.sleep(0.2)
    terminal.type(b"\x03")
    terminal.until(run, b"$ ")
    terminal.type(b"exit 4\r")
    assert run.wait() == 4
    assert not [seen for seen in run.seen if seen[1] == "Z"]
    run.close()


def test_all_output_is_shown_before_the_end(rig: Rig, terminal: Terminal) -> None:
    """What the agent wrote last is on the screen when the run ends, even megabytes of it."""
    run = start(rig, terminal, "sh", "-c", "yes 0123456789abcdef | head -n 100000; echo last")
    terminal.until(run, b"last\r\n", 30)
    assert run.wait() == 0
    run.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_restored(rig: Rig, terminal: Terminal, number: int) -> None:
    """Killing `cloister run` politely ends the agent and restores the terminal."""
    run = start(rig, terminal, "sh", "-c", "echo up; exec sleep 60")
    terminal.until(run, b"up")
    run.process.send_signal(number)
    assert run.wait() == 128 + number
    assert terminal.restored()
    run.close()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGALRM, signal.SIGXCPU])
def test_a_fatal_signal_leaves_the_terminal_restored(rig: Rig, terminal: Terminal, number: int) -> None:
    """Even a signal that kills us outright leaves the user's terminal as it was."""
    run = start(rig, terminal, "sh", "-c", "echo up; exec sleep 60")
    terminal.until(run, b"up")
    assert not terminal.restored()
    run.process.send_signal(number)
    assert run.wait() == -number
    assert terminal.restored()
    run.close()


def test_a_lost_broker_leaves_the_terminal_restored(rig: Rig, terminal: Terminal) -> None:
    """When the broker dies the run ends with 125, one line, and the terminal as it was."""
    run = start(rig, terminal, "sh", "-c", "echo up; exec sleep 60")
    terminal.until(run, b"up")
    run.outer.close()
    run.inner.close()
    assert run.process.wait(5) == 125
    terminal.until(run, b"[broker-gone]")
    assert terminal.restored()
    run.close()


def test_a_pty_without_a_terminal_is_refused(rig: Rig) -> None:
    """A pty is only for a terminal: with pipes the run ends with 125 and says why."""
    run = Run(rig, flags=PTY)
    assert run.process.wait(5) == 125
    assert b"cannot open a pty" in run.process.stderr.read()
    run.close()


def test_a_terminal_as_plain_stdio_is_put_right(rig: Rig, terminal: Terminal) -> None:
    """Attack: with stdout in a pipe the agent has the user's terminal as stdin, and leaves it raw without echo."""
    run = Run(rig, **{**terminal.popen(), "stdout": subprocess.PIPE})
    run.go("sh", "-c", "stty raw -echo; stty -a")
    assert run.wait() == 0
    assert b"-echo " in run.process.stdout.read()
    assert terminal.restored()
    run.close()


def test_a_start_in_the_background_waits(rig: Rig, terminal: Terminal) -> None:
    """A run that needs the terminal stops while another job has it, and leaves the modes alone; fg starts it."""
    script = "set -m; %s outer %d & sleep 0.3; stty -a | grep -q isig && echo cooked; fg; echo ended $?"
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    shell = subprocess.Popen(
        ["bash", "-c", script % (rig.shim, theirs.fileno())], pass_fds=[theirs.fileno()], **terminal.popen()
    )
    theirs.close()
    run = Run(rig, flags=PTY, launch=False)
    run.process.kill()
    run.outer.close()
    run.outer = frames.Channel(ours)
    run.launch()
    run.go("sh", "-c", "stty size; exit 7")
    seen = terminal.until(run, b"ended 7\r\n")
    assert seen.index(b"cooked") < seen.index(b"24 80")
    assert shell.wait(5) == 0
    run.close()


def question(text: bytes) -> bytes:
    """Return the payload of a question with answers y and n; n at Enter, - where nobody answers."""
    return frames.encode_list([text, b"yn", b"n", b"-"])


@pytest.mark.parametrize(
    ("keys", "answer"), [(b"y", b"y"), (b"n", b"n"), (b"\r", b"n"), (b"xy", b"y"), (b"\x04", b"-")]
)
def test_a_question_before_the_launch(rig: Rig, terminal: Terminal, keys: bytes, answer: bytes) -> None:
    """One letter, not echoed, answers; what is not allowed is passed over; Enter is the default, Ctrl-D no answer."""
    run = Run(rig, launch=False, **terminal.popen())
    run.outer.send("Q", question(b"carry \x1b[2J HOME in?"))
    assert terminal.until(run, b"in?") == b"carry ?[2J HOME in?"
    time.sleep(0.35)
    terminal.type(keys)
    assert run.until("outer", "A") == answer
    run.outer.send("F", b"\0")
    assert run.process.wait(5) == 0
    assert terminal.until(run, b"\r\n") == b"\r\n"
    assert terminal.restored()
    run.close()


def test_without_a_terminal_there_is_no_answer(rig: Rig) -> None:
    """Nobody can be asked, so the broker's letter for that comes back at once."""
    run = Run(rig, launch=False, start_new_session=True)
    run.outer.send("Q", question(b"?"))
    assert run.until("outer", "A") == b"-"
    run.close()


def test_a_question_over_a_running_agent(rig: Rig, terminal: Terminal) -> None:
    """The agent's output waits, the letter is not the agent's to see, and a full-screen agent is made to redraw."""
    script = "trap 'echo redraw' WINCH; echo up; while :; do read x && echo got $x; done"
    run = start(rig, terminal, "bash", "-c", script)
    terminal.until(run, b"up\r\n")
    run.outer.send("Q", question(b"allow example.org?"))
    terminal.until(run, b"allow example.org?")
    terminal.type(b"y")  # typed for the agent a moment before: too early to be an answer
    time.sleep(0.4)
    terminal.type(b"n")
    assert run.until("outer", "A") == b"n"
    terminal.type(b"hello\r")
    shown = terminal.until(run, b"got hello\r\n")
    assert b"redraw" in shown
    assert b"yhello" not in shown
    run.process.terminate()
    assert run.wait() in {143, 0}
    run.close()


def test_a_question_can_be_taken_back(rig: Rig, terminal: Terminal) -> None:
    """A question that stands too long goes off the terminal unanswered, output goes on, another can come."""
    run = start(rig, terminal, "sh", "-c", "echo up; while :; do sleep 0.1; echo tick; done")
    terminal.until(run, b"up\r\n")
    for _ in range(2):
        run.outer.send("Q", question(b"allow example.org?"))
        terminal.until(run, b"allow example.org?")
        run.outer.send("Q", frames.encode_list([]))
        assert run.until("outer", "A") == b"-"
        terminal.until(run, b"tick\r\ntick\r\n")
    run.outer.send("Q", frames.encode_list([]))  # already answered: nothing happens
    terminal.until(run, b"tick\r\ntick\r\n")
    run.process.terminate()
    assert run.wait() == 143
    run.close()


def test_attach_brings_a_second_terminal(rig: Rig, terminal: Terminal) -> None:
    """`cloister exec` with a terminal: `X` gets a pty of the sandbox, whose master goes to that call."""
    run = Run(rig)
    run.go("sleep", "60")
    run.until("inner", "R")
    second = Run(rig, flags=PTY, argv=[], **terminal.popen())
    run.terminals[frames.encode_u32(5)] = second.outer
    run.execute(5, [], "sh", "-c", "stty size </dev/tty; tty; read x; echo got $x; exit 9", pty=True)
    run.until("inner", "M")
    second.until("outer", "M")
    run.inner.send("M", frames.encode_u32(5))
    seen = terminal.until(second, b"/dev/pts/0\r\n")
    assert b"24 80\r\n" in seen
    terminal.type(b"word\r")
    terminal.until(second, b"got word\r\n")
    assert run.until("inner", "E") == b"\x05\0\0\0\x09"
    second.outer.send("F", b"\x09")
    assert second.process.wait(5) == 9
    assert terminal.restored()
    run.process.terminate()
    assert run.wait() == 143
    second.close()
    run.close()


def test_the_terminal_is_the_sandboxs_own(rig: Rig, terminal: Terminal) -> None:
    """ttyname(3) finds it in the sandbox's devpts, and no descriptor in there leads to the user's terminal."""
    mine = os.ttyname(terminal.slave)
    script = (
        "tty; readlink /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2; ls /dev/pts; "
        "for f in /proc/[0-9]*/fd/*; do readlink $f; done | grep -c pts; ls -l /dev/console; stty -a | head -1; exit 5"
    )
    run = start(rig, terminal, "sh", "-c", script)
    seen = terminal.until(run, b"speed").decode()
    assert run.wait() == 5
    assert seen.split()[:6] == ["/dev/pts/0"] * 4 + ["0", "ptmx"], seen
    assert mine not in seen.replace("/dev/pts/0", "")
    assert "cannot access '/dev/console'" in seen
    run.close()


def test_keys_cannot_be_pushed_into_the_users_terminal(rig: Rig, terminal: Terminal) -> None:
    """Attack: TIOCSTI, without a filter in the way, lands in the agent's own pty at best."""
    attack = (
        "import fcntl, termios\n"
        "for fd in (0, 1, 2):\n"
        "    for byte in b'touch x' + bytes([10]):\n"
        "        try: fcntl.ioctl(fd, termios.TIOCSTI, bytes([byte]))\n"
        "        except OSError: pass\n"
        "print('tried')"
    )
    run = start(rig, terminal, "/usr/bin/python3", "-c", attack)
    terminal.until(run, b"tried")
    assert run.wait() == 0
    assert not select.select([terminal.slave], [], [], 0.2)[0]
    run.close()


def test_a_terminal_without_a_size_counts_as_80_by_24(rig: Rig, terminal: Terminal) -> None:
    """Full-screen programs start where the user's terminal does not know its size, such as a serial line."""
    terminal.resize(0, 0)
    run = start(rig, terminal, "stty", "size")
    assert terminal.until(run, b"24 80\r\n")
    assert run.wait() == 0
    run.close()


def test_a_raw_program_gets_every_key(rig: Rig, terminal: Terminal) -> None:
    """What vim or less do works: raw mode, single keys, Ctrl-C and Ctrl-Z as plain bytes, modes back afterwards."""
    run = start(rig, terminal, "sh", "-c", "stty raw -echo; echo up; head -c 3 | od -An -tx1; stty sane; exit 6")
    terminal.until(run, b"up")
    terminal.type(b"\x03\x1aq")
    terminal.until(run, b"03 1a 71")
    assert run.wait() == 6
    assert terminal.restored()
    run.close()


def test_modes_of_the_users_terminal_reach_the_agents(rig: Rig, terminal: Terminal) -> None:
    """An erase key or a missing echo of the user's terminal is the same inside."""
    modes = termios.tcgetattr(terminal.slave)
    modes[3] &= ~termios.ECHO
    modes[6][termios.VERASE] = b"\x08"
    termios.tcsetattr(terminal.slave, termios.TCSANOW, modes)
    run = start(rig, terminal, "sh", "-c", "stty -a | tr -d '\n'; echo done")
    shown = terminal.until(run, b"done")
    assert b"erase = ^H" in shown
    assert b" -echo " in shown
    assert run.wait() == 0
    run.close()


FAKES = {
    "a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "another device": lambda: os.open("/dev/null", os.O_RDWR),
    "a pipe": lambda: os.pipe()[0],
    "a slave": lambda: pty.openpty()[1],
    "an event counter": lambda: os.eventfd(0),
}


@pytest.mark.parametrize("fake", FAKES)
def test_what_is_no_master_is_refused(rig: Rig, terminal: Terminal, fake: str) -> None:
    """Attack: in place of the pty something else comes out of the sandbox; the run ends, the terminal is untouched."""
    second = Run(rig, flags=PTY, argv=[], **terminal.popen())
    descriptor = FAKES[fake]()
    second.outer.send("M", b"", [descriptor])
    terminal.until(second, b"cannot use the pty of the sandbox: Invalid argument")
    assert second.process.wait(5) == 125
    assert terminal.restored()
    os.close(descriptor)
    second.close()


@pytest.mark.parametrize("flags", [0, PTY])
def test_a_second_or_unasked_master_ends_the_run(rig: Rig, terminal: Terminal, flags: int) -> None:
    """Attack: a pty where none was asked for, or one more, could take the user's keys; both are refused."""
    run = start(rig, terminal, "sh", "-c", "echo up; sleep 60") if flags else Run(rig, **terminal.popen())
    if flags:
        terminal.until(run, b"up")
    else:
        run.go("sleep", "60")
        run.until("inner", "R")
    master, slave = pty.openpty()
    run.outer.send("M", b"", [master])
    terminal.until(run, b"a pty that was not asked for [protocol]")
    assert run.process.wait(5) == 125
    assert terminal.restored()
    os.close(master)
    os.close(slave)
    run.close()


def test_a_master_that_never_falls_silent_does_not_hold_up_the_end(rig: Rig, terminal: Terminal) -> None:
    """Attack: when the command has ended, something else inside writes to its pty without end; the call ends."""
    second = Run(rig, flags=PTY, argv=[], **terminal.popen())
    master, slave = pty.openpty()
    writer = subprocess.Popen(["yes"], stdout=slave, **as_user())
    try:
        second.outer.send("M", b"", [master])
        second.until("outer", "M")
        assert select.select([terminal.master], [], [], 5)[0]
        second.outer.send("F", b"\x03")
        end = time.monotonic() + 10
        while second.process.poll() is None and time.monotonic() < end:
            if select.select([terminal.master], [], [], 0.05)[0]:
                os.read(terminal.master, 65536)
        assert second.process.poll() == 3
    finally:
        writer.kill()
        writer.wait()
        os.close(master)
        os.close(slave)
        second.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_terminal_is_there_ends_the_start(rig: Rig, terminal: Terminal, number: int) -> None:
    """Ctrl-C while the sandbox comes up is not lost: the command that waits for its terminal is ended."""
    run = Run(rig, flags=PTY, **terminal.popen())
    run.terminals[bytes(4)] = _Nowhere()
    run.go("sleep", "60")
    run.until("inner", "M")
    run.inner.send("S", bytes([signal.SIGTSTP]))
    run.inner.send("S", bytes([signal.SIGCONT]))
    run.process.send_signal(number)
    assert run.wait() == 128 + number
    assert terminal.restored()
    run.close()


class _Nowhere:
    """A channel to an outer half that does not answer."""

    def send(self, *_: object) -> None:
        """Drop the frame."""


def test_what_bubblewrap_says_of_its_failure_is_shown(rig: Rig, terminal: Terminal) -> None:
    """Bubblewrap has no terminal, but its complaint reaches the user's, without control characters."""
    run = Run(rig, flags=PTY, bwrap=["--no-such-option\x1b[2J"], **terminal.popen())
    terminal.until(run, b"Unknown option --no-such-option?[2J")
    assert run.wait() == 125
    assert terminal.restored()
    run.close()
