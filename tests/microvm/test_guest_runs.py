"""`cloister run` in a microVM, through the installed program: in use it is like any run.

Boots are slow without hardware for them, so most tests look into one guest that lives for all of them.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.guest_user import BOOT_S, GuestUser, Installs
from support.homes import canaries, make_home, make_workspace
from support.terminal import Terminal

pytestmark = pytest.mark.usefixtures("nothing_left_in_the_end")


class Living(NamedTuple):
    """A user with one guest that lives."""

    user: GuestUser
    home: Path
    workspace: Path
    run: str

    def say(self, script: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a shell script in the guest."""
        return self.user.exec(self.run, script, cwd=self.workspace, stdin=stdin)


@pytest.fixture(scope="module")
def living(image: Installs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """One guest for the tests of this file."""
    home = make_home(tmp_path_factory.mktemp("guests") / "home")
    workspace = make_workspace(home / "src/project")
    user = GuestUser(home, image)
    run = user.begin("echo output; echo begun > begun; exec sleep 600", cwd=workspace)
    yield Living(user, home, workspace, run)
    user.close()


@pytest.fixture(scope="module")
def nothing_left_in_the_end() -> Iterator[None]:
    """No monitor of ours lives on when the guests are over."""
    before = _monitors()
    yield
    assert _monitors() <= before


def _monitors() -> set[int]:
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and folder.stat().st_uid == os.getuid():
                words = (folder / "cmdline").read_bytes()
                found |= {int(folder.name)} if b"/run/cloister/vm/qmp.sock" in words else set()
        except OSError:
            continue
    return found


# --- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 125, 255])
def test_exit_codes_are_the_commands_own(living: Living, code: int) -> None:
    """Whatever a command exits with is what the caller gets."""
    assert living.say(f"exit {code}").returncode == code


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
def test_death_by_signal_is_128_and_the_signal(living: Living, number: str, code: int) -> None:
    """A command killed by signal n gives 128+n, as in a shell."""
    assert living.say(f"kill -{number} $$").returncode == code


def test_missing_and_unusable_programs_speak_as_env_does(living: Living) -> None:
    """127 for a program that the image does not have, 126 for one that cannot be executed, with words for people."""
    missing = living.user.run("exec", living.run, "--", "no-such-program", cwd=living.workspace)
    unusable = living.user.run("exec", living.run, "--", "/etc/passwd", cwd=living.workspace)

    assert (missing.returncode, unusable.returncode) == (127, 126)
    assert "exec-failed" in missing.stderr
    assert "exec-failed" in unusable.stderr


def test_pipes_are_binary_safe(living: Living) -> None:
    """Every byte value passes through standard input and output unchanged, many times."""
    data = bytes(range(256)) * 8_000
    done = subprocess.run(
        living.user.command("exec", living.run, "--", "cat"), input=data, capture_output=True, cwd=living.workspace,
        env=living.user.environment, timeout=BOOT_S, check=False,
    )  # fmt: skip

    assert done.stdout == data
    assert done.returncode == 0


def test_standard_error_stays_apart(living: Living) -> None:
    """The two outputs are not merged."""
    done = living.say("echo out; echo err >&2")

    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_it_is_listed_and_logged(living: Living) -> None:
    """`ps` shows the run as any other, `logs` its output, `logs --console` what the guest's kernel said."""
    listed = living.user.run("ps", "--json", cwd=living.workspace)
    output = living.user.run("logs", living.run, cwd=living.workspace)
    console = living.user.run("logs", "--console", living.run, cwd=living.workspace)

    assert any(one["id"] == living.run and one["status"] == "running" for one in _rows(listed.stdout))
    assert output.stdout == "output\n"
    assert console.returncode == 0


def _rows(text: str) -> list[dict[str, object]]:
    found = json.loads(text)
    return found if isinstance(found, list) else found["runs"]


def test_a_terminal_is_a_terminal(living: Living) -> None:
    """A command has a tty of the size of ours; ^C goes to what runs in front, and the shell lives on."""
    command = living.user.command("exec", living.run, "--", "/bin/sh")
    with Terminal(command, cwd=living.workspace, env=living.user.environment, size=(33, 77)) as terminal:
        terminal.type("tty; stty size; sh -c 'echo st''arted; exec sleep 300'\n")
        terminal.until("/dev/pts/", BOOT_S)
        terminal.until("33 77", BOOT_S)
        terminal.until("started", BOOT_S)
        terminal.type("\x03")
        terminal.type("echo st''ill here\n")
        terminal.until("still here", BOOT_S)
        terminal.type("exit 9\n")

        assert terminal.wait(BOOT_S) == 9


def test_many_commands_at_once_do_not_mix(living: Living) -> None:
    """Eight commands side by side get their own input and give their own output."""
    words = living.user.command("exec", living.run, "--", "cat")
    started = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=living.workspace,
                         env=living.user.environment)
        for _ in range(8)
    ]  # fmt: skip
    answers = [one.communicate(f"number {index}".encode(), BOOT_S)[0] for index, one in enumerate(started)]

    assert answers == [f"number {index}".encode() for index in range(8)]


# --- what the agent finds --------------------------------------------------------------------------


def test_no_canary_of_the_home_is_there(living: Living) -> None:
    """The home is empty, the workspace is not, and no other place of this host exists."""
    theft = "; ".join(f"cat ~/{name}" for name in canaries(living.home))
    done = living.say(f"{theft}; cat README; ls -A ~; pwd; ls /root /var/lib/cloister {living.user.runtime}")
    secrets = [canary for canary in canaries(living.home).values() if canary in done.stdout + done.stderr]

    assert "a project" in done.stdout
    assert str(living.workspace) in done.stdout
    assert not secrets
    assert str(living.user.runtime) in done.stderr


def test_the_agent_is_the_caller_without_power(living: Living) -> None:
    """It has the caller's uid and name, no capability, no way to get one, and our system call filter."""
    done = living.say("id -u; id -un; grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status")
    words = done.stdout.split()

    assert int(words[0]) == (os.getuid() or 1000)
    assert words[3] == words[5] == "0" * 16
    assert (words[7], words[9]) == ("1", "2")


def test_only_the_proxy_is_reachable(living: Living) -> None:
    """There is no network device but loopback; through the proxy a denial comes at once and says why."""
    script = (
        "import os, socket, urllib.request as r, urllib.error\n"
        "print(sorted(os.listdir('/sys/class/net')))\n"
        "s = socket.socket(); s.settimeout(3); print(s.connect_ex(('192.0.2.1', 80)))\n"
        "try: r.urlopen('http://denied.example.org/', timeout=20)\n"
        "except urllib.error.HTTPError as e: print(e.code, e.read().decode())\n"
    )
    done = living.say("python3 -", script.encode())

    assert "['lo']" in done.stdout, done.stderr
    assert "\n0\n" not in done.stdout
    assert "not-in-allowlist" in done.stdout


def test_the_environment_is_made_from_nothing(living: Living) -> None:
    """What the caller has is not there; the proxy is, in the spellings that programs look for."""
    done = living.user.run("exec", living.run, "--", "env", cwd=living.workspace, SECRET_TOKEN="canary-env")

    assert "canary-env" not in done.stdout
    assert "HTTPS_PROXY=http://127.0.0.1:3128" in done.stdout
    assert f"CLOISTER_RUN={living.run}" in done.stdout


def test_the_guest_is_its_own(living: Living) -> None:
    """Another kernel, a name of its own, and no process, socket or device of this host."""
    done = living.say("uname -rn; cat /proc/sys/kernel/random/boot_id; ls /dev; cat /proc/1/comm")

    assert os.uname().release not in done.stdout
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() not in done.stdout
    assert not {"kvm", "vda", "vdb", "vdc", "vport0p1", "mem"} & set(done.stdout.split())


# --- its end ------------------------------------------------------------------------------------------


def test_a_stopped_run_hands_its_work_back(image: Installs, home: Path, workspace: Path) -> None:
    """`stop` ends the machine; what the agent wrote is in the workspace, and the receipt says in what it ran."""
    user = GuestUser(home, image)
    run = user.begin("echo written > written; exec sleep 600", cwd=workspace)
    during = (workspace / "written").exists()
    user.exec(run, "while [ ! -e written ]; do sleep 0.1; done", cwd=workspace)
    stopped = user.run("stop", run, cwd=workspace, timeout_s=BOOT_S)
    (begun,) = user.audited("run.started")
    user.close()
    receipt = user.receipts()[-1]

    assert (during, stopped.returncode) == (False, 0)
    assert (workspace / "written").read_text() == "written\n"
    assert (receipt["isolation"], receipt["host"]["image"].split()[0]) == ("microvm", "test")
    assert receipt["host"]["guest_verity"]
    assert begun["details"]["manifest"] == receipt["host"]["manifest"]
    assert any("verdict=passed" in one for one in receipt["probe"])
    assert not list(user.state.glob("runs/*/vm/*.img*"))


def test_a_run_ends_by_the_callers_signal(image: Installs, home: Path, workspace: Path) -> None:
    """SIGTERM for `cloister run` arrives at the agent, which may answer it, and its exit code is ours."""
    user = GuestUser(home, image)
    script = 'trap "echo asked; exit 5" TERM; echo ready; while :; do sleep 0.1; done'
    process = user.start("run", "--no-pty", "shell", "--", "/bin/sh", "-c", script, cwd=workspace)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=BOOT_S)
    left = list((user.runtime / "cloister/runs").iterdir())
    user.close()

    assert (process.returncode, out) == (5, b"asked\n")
    assert err in {b"", b"Terminated\n"}  # the shell's word for its sleep, which has the signal as well
    assert not left
