"""Whatever of a run in a microVM is killed: it ends, says why, and leaves nothing; what was written is not lost."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.guest_user import BOOT_S, GuestUser, Installs

_BEGUN = "echo begun > begun; sync; echo ready; exec sleep 600"
_SLOW = pytest.mark.slow
_GONE_S = 20


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _below(pid: int) -> list[int]:
    found = _children(pid)
    return found + [one for child in found for one in _below(child)]


def _line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _family(outer: int) -> dict[str, int]:
    """Return the processes of a run by what they are."""
    found = {"outer": outer}
    for pid in _below(outer):
        program = _line(pid).split(b"\0")[0]
        for name, ending in (("bwrap", b"bwrap"), ("keeper", b"/shim"), ("monitor", b"x86_64")):
            if program.endswith(ending):
                found.setdefault(name, pid)
    return found


def _start(user: GuestUser, workspace: Path) -> subprocess.Popen[bytes]:
    process = user.start("run", "--no-pty", "shell", "--", "/bin/sh", "-c", _BEGUN, cwd=workspace)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", process.stderr.read() if process.stderr else b""
    return process


def _all_gone(pids: list[int]) -> list[int]:
    until = time.monotonic() + _GONE_S
    while (left := [pid for pid in pids if _line(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _leftovers(user: GuestUser) -> list[Path]:
    runs = user.runtime / "cloister/runs"
    return [*(runs.iterdir() if runs.exists() else ()), *user.state.glob("runs/*/vm/*.img*")]


KILLED = [
    pytest.param("monitor", 125, "monitor-died", id="monitor"),
    pytest.param("keeper", 125, "sandbox-died", id="keeper", marks=_SLOW),
    pytest.param("bwrap", 125, "sandbox-died", id="bwrap", marks=_SLOW),
    pytest.param("outer", -9, "client-died", id="outer", marks=_SLOW),
]


@pytest.mark.parametrize(("victim", "code", "reason"), KILLED)
def test_a_killed_part_ends_the_run(  # noqa: PLR0913  # fixtures and a row of the table
    image: Installs, home: Path, workspace: Path, victim: str, code: int, reason: str
) -> None:
    """The rest is gone within seconds, the receipt has the reason, and what reached the disk is handed back."""
    user = GuestUser(home, image)
    process = _start(user, workspace)
    family = _family(process.pid)
    os.kill(family[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=BOOT_S)
    left = _all_gone([pid for name, pid in family.items() if name != "outer"])
    receipt = _receipt(user)
    leftovers = _leftovers(user)
    user.close()

    assert set(family) == {"outer", "bwrap", "keeper", "monitor"}
    assert (left, leftovers) == ([], [])
    assert (process.returncode, receipt["reason"]) == (code, reason)
    assert victim == "outer" or reason.encode() in err
    assert (workspace / "begun").read_text() == "begun\n"


def _receipt(user: GuestUser) -> dict[str, object]:
    until = time.monotonic() + BOOT_S
    while not user.receipts() and time.monotonic() < until:
        time.sleep(0.05)
    return user.receipts()[-1]


def test_a_killed_broker_ends_the_run_and_the_next_one_tidies(image: Installs, home: Path, workspace: Path) -> None:
    """The caller hears it at once; the next broker closes the record, and the work is there to be reviewed."""
    user = GuestUser(home, image)
    process = _start(user, workspace)
    family = _family(process.pid)
    os.kill(user.broker_pid, signal.SIGKILL)
    _, err = process.communicate(timeout=BOOT_S)
    left = _all_gone(list(family.values()))
    user.run("ps", cwd=workspace)
    again = user.inside("test ! -e begun", cwd=workspace)
    run = user.records()[0]["id"]
    copy = ("vm", "cp", f"{run}:/workspace/begun", str(home / "copy"))
    copied = user.run(*copy, cwd=workspace, timeout_s=BOOT_S)
    shown = user.run("diff", run, cwd=workspace, timeout_s=BOOT_S)
    late = user.run(*copy, cwd=workspace, timeout_s=BOOT_S)
    applied = user.run("apply", run, cwd=workspace, timeout_s=BOOT_S)
    reason = user.receipts()[0]["reason"]
    leftovers = _leftovers(user)
    user.close()

    assert (process.returncode, left) == (125, [])
    assert b"broker" in err
    assert (again.returncode, reason) == (0, "broker-died")
    assert (copied.returncode, (home / "copy").read_text()) == (0, "begun\n"), copied.stderr
    assert "wait for review [vm-disk-gone]" in late.stderr
    assert "begun" in shown.stdout
    assert (applied.returncode, (workspace / "begun").read_text()) == (0, "begun\n"), applied.stderr
    assert not leftovers


def test_ctrl_c_while_a_guest_boots_ends_it(image: Installs, home: Path, workspace: Path) -> None:
    """Nobody waits for a boot that is not wanted any more: 130 within seconds, and nothing is left."""
    user = GuestUser(home, image)
    process = user.start("run", "--no-pty", "shell", "--", "sleep", "600", cwd=workspace)
    until = time.monotonic() + BOOT_S
    while "monitor" not in (family := _family(process.pid)) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    left, leftovers = _all_gone(list(family.values())), _leftovers(user)
    user.close()

    assert "monitor" in family
    assert (process.returncode, left, leftovers) == (130, [], [])


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.8, 1.5])
def test_a_caller_killed_on_the_way_leaves_nothing(
    image: Installs, home: Path, workspace: Path, after_s: float
) -> None:
    """Whenever the caller is killed before the agent runs: no process, no socket, no disk, and the next run works."""
    user = GuestUser(home, image)
    user.inside("true", cwd=workspace)
    process = user.start("run", "--no-pty", "shell", "--", "sleep", "600", cwd=workspace)
    time.sleep(after_s)
    family = _below(process.pid)
    process.kill()
    process.communicate(timeout=BOOT_S)
    left = _all_gone(family)
    until = time.monotonic() + _GONE_S
    while _leftovers(user) and time.monotonic() < until:
        time.sleep(0.1)
    leftovers = _leftovers(user)
    twin = user.inside("echo works", cwd=workspace)
    user.close()

    assert (left, leftovers) == ([], [])
    assert twin.stdout == "works\n"


def test_an_image_that_is_changed_under_a_run_ends_it(image: Installs, home: Path, workspace: Path) -> None:
    """One block that is not what was signed, once read, stops the guest's kernel; the caller hears that and why."""
    user = GuestUser(home, image)
    (root,) = (home / ".local/share/cloister/images/test").glob("*/root.img")
    own = root.with_suffix(".own")
    shutil.copyfile(root, own)  # the installed one is everybody's
    own.rename(root)
    run = user.begin(_BEGUN, cwd=workspace)
    user.exec(run, "while [ ! -e begun ]; do sleep 0.1; done; sync", cwd=workspace)
    _spoil(root)
    user.exec(run, "git --version; python3 -c 'import http.server, sqlite3, xml.dom'; find / -xdev", cwd=workspace)
    receipt = _receipt(user)
    events = user.run("logs", "--events", run, cwd=workspace).stdout
    console = user.run("logs", "--console", run, cwd=workspace).stdout
    user.close()

    assert (receipt["reason"], receipt["exit_code"]) == ("guest-corrupt", 125)
    assert "guest-corrupt" in events
    assert "verity" in console
    assert (workspace / "begun").read_text() == "begun\n"


def _spoil(root: Path) -> None:
    """Change one byte in each block behind the first tenth."""
    size = root.stat().st_size
    with root.open("r+b") as file:
        for at in range(size // 10 // 4096 * 4096, size, 4096):
            file.seek(at + 100)
            byte = file.read(1)
            file.seek(at + 100)
            file.write(bytes([byte[0] ^ 1]))
