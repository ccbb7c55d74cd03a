"""`cloister run` and `exec` on a terminal: the pty is the sandbox's own, and keys do what they always do."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest

from support.cloister import User
from support.terminal import Terminal

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
LOOK = (
    "echo begin; tty; readlink /proc/self/fd/0; ls -1 /dev/pts; "
    "for f in /proc/[0-9]*/fd/*; do readlink $f; done | grep -E 'tty|pts|console|ptmx' | sort -u; "
    "ls /dev/console 2>&1; stty size; echo end"
)


def on_terminal(user: User, workspace: Path, *words: str, size: tuple[int, int] = (24, 80)) -> Terminal:
    """Start `cloister WORDS` on a terminal."""
    return Terminal(user.command(*words), cwd=workspace, env=user.environment, size=size)


def inside(user: User, workspace: Path, script: str) -> Terminal:
    """Start a shell script in the sandbox on a terminal."""
    return on_terminal(user, workspace, "run", "shell", "--", "/bin/sh", "-c", script)


def test_run_and_exec_get_terminals_of_the_sandbox(user: User, workspace: Path) -> None:
    """`tty` names a pty of the sandbox's devpts, for `run` and for `exec`; the user's terminal is nowhere inside."""
    with inside(user, workspace, f"{LOOK}; read x; exit 4") as first:
        seen = first.until("end\r\n").partition("begin\r\n")[2].splitlines()
        assert seen[:5] == ["/dev/pts/0", "/dev/pts/0", "0", "ptmx", "/dev/pts/0"], seen
        assert "cannot access '/dev/console'" in seen[5]
        assert seen[6:] == ["24 80", "end"]
        run = user.wait_running()[0]["id"]
        with on_terminal(user, workspace, "exec", run, "--", "sh", "-c", f"{LOOK}; exit 5", size=(30, 100)) as second:
            other = second.until("end\r\n").partition("begin\r\n")[2].splitlines()
            assert second.wait() == 5
            assert second.restored
        assert other[:2] == ["/dev/pts/1", "/dev/pts/1"], other
        assert other[-2:] == ["30 100", "end"]
        assert first.name not in other[2:] or first.name in ("/dev/pts/0", "/dev/pts/1")
        first.type("\r")
        assert first.wait() == 4
        assert first.restored
    user.close()


def test_with_pipes_there_is_no_terminal_inside(user: User, workspace: Path) -> None:
    """The twin: without a terminal outside there is none inside, and nothing hangs."""
    done = user.inside("tty; test -t 1; echo $?", cwd=workspace)

    assert done.stdout == "not a tty\n1\n"
    user.close()


def test_resize_reaches_the_agent(user: User, workspace: Path) -> None:
    """When the window changes its size, a program inside hears of it and sees the new one."""
    script = "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.05; done"
    with inside(user, workspace, script) as terminal:
        terminal.until("up\r\n")
        terminal.resize(50, 132)
        terminal.until("50 132\r\n")
        assert terminal.wait() == 0
    user.close()


def test_ctrl_c_interrupts_the_agent(user: User, workspace: Path) -> None:
    """Ctrl-C is the agent's: one that handles it goes on, one that does not ends with 130."""
    script = "trap 'trap - INT; echo caught; exec sleep 30' INT; echo up; while :; do sleep 0.05; done"
    with inside(user, workspace, script) as terminal:
        terminal.until("up\r\n")
        terminal.type("\x03")
        terminal.until("caught\r\n")
        terminal.silent(0.3, "")
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert terminal.restored
    user.close()


def test_ctrl_z_and_fg_in_the_users_shell(user: User, workspace: Path) -> None:
    """Ctrl-Z gives the user's shell back, with the agent stopped and the terminal as it was; `fg` goes on."""
    script = shlex.quote("echo up; n=0; while read x; do echo got $x; test $x = quit && exit 9; done")
    command = shlex.join([*user.command("run", "shell", "--", "/bin/sh", "-c")]) + f" {script}"
    with Terminal(["bash", "--norc", "--noediting", "-i"], cwd=workspace, env=user.environment) as terminal:
        terminal.type(f"PS1='%'; {command}\r")
        terminal.until("up\r\n")
        terminal.type("one\r")
        terminal.until("got one\r\n")
        terminal.type("\x1a")
        terminal.until("Stopped")
        terminal.type("echo in$((1+1))shell\r")
        terminal.until("in2shell")
        terminal.type("fg\r")
        terminal.until("fg\r\n")
        terminal.silent(0.3, "")
        terminal.type("quit\r")
        terminal.until("got quit\r\n")
        terminal.until("%")
        terminal.type("echo code $?\r")
        terminal.until("code 9\r\n")
        terminal.type("exit\r")
        terminal.wait()
    user.close()


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -9 $$", 137)])
def test_exit_codes_on_a_terminal(user: User, workspace: Path, command: str, code: int) -> None:
    """The exit codes are the same as with pipes."""
    with inside(user, workspace, command) as terminal:
        assert terminal.wait() == code
        assert terminal.restored
    user.close()


def test_a_missing_program_on_a_terminal(user: User, workspace: Path) -> None:
    """A command that cannot be executed is 126 or 127 with words for people, on a terminal as well."""
    (workspace / "data").write_text("no program\n")
    for word, code in (("./data", 126), ("./missing", 127)):
        with on_terminal(user, workspace, "run", "shell", "--", word) as terminal:
            assert terminal.wait() == code
            assert b"exec-failed" in terminal.shown
            assert terminal.restored
    user.close()


def test_hanging_up_ends_the_run(user: User, workspace: Path) -> None:
    """When the terminal's window is closed nothing of the run stays, and it has a receipt."""
    with inside(user, workspace, "echo up; exec sleep 100") as terminal:
        terminal.until("up\r\n")
        terminal.process.send_signal(signal.SIGHUP)
        assert terminal.wait() == 128 + signal.SIGHUP
    assert user.receipts()[-1]["exit_code"] == 128 + signal.SIGHUP
    user.close()


def test_full_screen_programs_work(user: User, workspace: Path) -> None:
    """A program that takes the whole screen, raw keys and its size runs as it does outside."""
    with on_terminal(user, workspace, "run", "shell", "--", "vi", "-u", "NONE", "README") as terminal:
        terminal.until("a project")
        terminal.type("Onew line\x1b:wq\r")
        assert terminal.wait() == 0
        assert terminal.restored
    assert (workspace / "README").read_text() == "new line\na project\n"
    user.close()


@pytest.mark.parametrize(
    "program", ["script -qec 'tty; exit 3' /dev/null", "tmux -f /dev/null new 'tty > t; exit' ; cat t; exit 3"]
)
def test_programs_that_make_ptys_of_their_own_work(user: User, workspace: Path, program: str) -> None:
    """script(1) and tmux(1) make further ptys inside: they come from the sandbox's devpts."""
    name = program.split(maxsplit=1)[0]
    if not Path(f"/usr/bin/{name}").exists():
        pytest.skip(f"{name} is not installed")
    with inside(user, workspace, program) as terminal:
        terminal.until("/dev/pts/1\r\n")
        assert terminal.wait() == 3
    user.close()


def test_a_detached_run_needs_no_terminal(user: User, workspace: Path) -> None:
    """`--detach` typed on a terminal starts a run with pipes: it outlives that terminal."""
    with on_terminal(user, workspace, "run", "--detach", "shell", "--", "sh", "-c", "tty; sleep 30") as terminal:
        assert terminal.wait() == 0
    user.wait_running()
    run = user.records()[-1]["id"]
    assert (user.state / f"runs/{run}/output.log").read_text() == "not a tty\n"
    user.run("stop", run, cwd=workspace)
    user.close()
