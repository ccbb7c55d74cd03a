"""`cloister-shim as`: a program that begins as nobody, or does not begin."""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.errors import StepError, UnsupportedError
from cloister.host.monitor_number import check_reachable, groups_for, hand_over, has_numbers
from cloister.plan.vm import FIRST_NUMBER, NUMBERS
from cloister.runs.client import SHIM

pytestmark = [pytest.mark.kernel, pytest.mark.root]
NUMBER = str(FIRST_NUMBER + 77)
TELL = ("/bin/grep", "-E", "^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapAmb)", "/proc/self/status")


def begun(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program under a number."""
    return subprocess.run((*before, SHIM, "as", *words), capture_output=True, text=True, timeout=30, check=False)


def test_everything_of_roots_is_given_up() -> None:
    """All three numbers of user and group, other groups, and every set of capabilities, inherited ones as well."""
    kept = ("setpriv", "--inh-caps=+setuid,+setgid", "--ambient-caps=+setuid,+setgid")
    for before in ((), kept):
        told = begun(NUMBER, "44444", "--", *TELL, before=before)
        lines = {line.partition(":")[0]: line.partition(":")[2].split() for line in told.stdout.splitlines()}
        assert lines["Uid"] == lines["Gid"] == [NUMBER] * 4
        assert lines["Groups"] == ["44444"]
        assert all(lines[name] == ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
        assert told.returncode == 0
    assert begun(NUMBER, "--", "/bin/sh", "-c", "exit 3").returncode == 3
    assert begun(NUMBER, "--", *TELL).stdout.count("Groups:\t \n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("0", "--", "/bin/true"), ("1000", "--", "/bin/true"), ("65535", "--", "/bin/true"),
        ("4294967294", "--", "/bin/true"), ("4294967295", "--", "/bin/true"), ("4294967296", "--", "/bin/true"),
        ("99999999999999999999", "--", "/bin/true"), ("-1", "--", "/bin/true"), ("", "--", "/bin/true"),
        ("2013265921x", "--", "/bin/true"), (" 2013265921", "--", "/bin/true"),
        (NUMBER, "0", "--", "/bin/true"), (NUMBER, "root", "--", "/bin/true"), (NUMBER, "", "--", "/bin/true"),
        (NUMBER, "44444", "--"), (NUMBER, "44444", "/bin/true"),
        (NUMBER, *(str(number) for number in range(50001, 50010)), "--", "/bin/true"),
        (NUMBER, "--", "/nowhere"),
    ],
    ids=lambda words: " ".join(words)[:40],
)  # fmt: skip
def test_what_is_no_number_of_nobodys_begins_nothing(words: tuple[str, ...]) -> None:
    """Root, numbers that may be somebody's, and words that are none."""
    assert begun(*words).returncode == 125


def test_eight_groups_are_taken() -> None:
    """The twin of the ninth above."""
    assert begun(NUMBER, *(str(number) for number in range(50001, 50009)), "--", "/bin/true").returncode == 0


def test_who_may_not_change_its_number_begins_nothing() -> None:
    """Without the right to it, or in a user namespace that has no such number, the program does not begin as it is."""
    for before in (
        ("setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups", "--inh-caps=-all"),
        ("unshare", "--user", "--map-root-user"),
        ("setpriv", "--bounding-set=-setuid"),
    ):
        words = (*before, SHIM, "as", NUMBER, "--", "/bin/echo", "begun")
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stdout) == (125, ""), before


def test_it_dies_with_its_parent() -> None:
    """The kernel forgets whom a process dies with when its number changes; it is asked again."""
    script = (
        "import os, signal, subprocess, sys, time\n"
        f"child = subprocess.Popen([{SHIM!r}, 'as', '{NUMBER}', '--', '/bin/sleep', '60'])\n"
        "until = time.monotonic() + 20\n"
        "while open(f'/proc/{child.pid}/comm').read() != 'sleep\\n' and time.monotonic() < until: time.sleep(0.01)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    descriptor = None
    try:
        descriptor = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 10)[0], "it lives on"
    os.close(descriptor)


def test_the_host_has_all_numbers_or_none() -> None:
    """Root of the host has them; a process without the rights, or of a namespace without them, does not."""
    assert has_numbers()
    question = "from cloister.host.monitor_number import has_numbers; print(has_numbers())"
    for before in (
        ("unshare", "--user", "--map-root-user"),
        ("setpriv", "--bounding-set=-setuid"),
        ("setpriv", "--bounding-set=-sys_admin"),
        ("setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups", "--inh-caps=-all"),
    ):
        words = (*before, sys.executable, "-c", question)
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout == "False\n", (before, done.stderr)
    assert NUMBERS + FIRST_NUMBER < 1 << 31, "some programs read numbers with a sign"


def opened(path: str, flags: int, number: int) -> str:
    """Say whether a process that is nobody can open again what it gets by descriptor."""
    held = os.open(path, flags)
    try:
        words = "import os, sys; os.open(f'/proc/self/fd/{sys.argv[1]}', int(sys.argv[2])); print('opened')"
        argv = (SHIM, "as", str(number), "--", "/usr/bin/python3", "-I", "-c", words, str(held), str(flags))
        done = subprocess.run(argv, pass_fds=[held], capture_output=True, text=True, timeout=30, check=False)
    finally:
        os.close(held)
    return done.stdout.strip()


def test_a_file_that_is_handed_over_can_be_opened_again(tmp_path: Path) -> None:
    """A disk by its run's number only, what is read only by everybody who gets it; and not before they are."""
    disk, root = tmp_path / "disk", tmp_path / "root"
    for path in (disk, root):
        path.write_bytes(b"x")
        path.chmod(0o600)
        assert opened(str(path), os.O_RDONLY, int(NUMBER)) == ""
    for path, flags in ((disk, os.O_RDWR), (root, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        hand_over(descriptor, int(NUMBER), write=flags == os.O_RDWR)
        os.close(descriptor)
        assert opened(str(path), flags, int(NUMBER)) == "opened"
    assert opened(str(root), os.O_RDWR, int(NUMBER)) == ""
    assert opened(str(disk), os.O_RDWR, int(NUMBER) + 1) == ""
    assert stat.S_IMODE(disk.stat().st_mode) == 0o660
    assert disk.stat().st_uid == 0, "it stays ours"


def test_a_file_of_somebody_elses_is_not_handed_over(tmp_path: Path) -> None:
    """Root changes no modes of other people's files; what everybody may read stays as it is."""
    path = tmp_path / "theirs"
    path.write_bytes(b"x")
    os.chown(path, 4242, 4242)
    for mode, write in ((0o600, False), (0o600, True), (0o666, True)):
        path.chmod(mode)
        with path.open("rb") as file, pytest.raises(StepError):
            hand_over(file.fileno(), int(NUMBER), write=write)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o644)
    with path.open("rb") as file:
        hand_over(file.fileno(), int(NUMBER), write=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_device_is_used_by_its_group(tmp_path: Path) -> None:
    """Everybody's needs no group, its group's needs that; one that is root's alone, or its group's, is refused."""
    device = tmp_path / "kvm"
    assert groups_for(str(device)) == ()
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for mode, group, wanted in ((0o666, 0, ()), (0o660, 44444, (44444,)), (0o666, 44444, ())):
        os.chown(device, 0, group)
        device.chmod(mode)
        assert groups_for(str(device)) == wanted
    for mode, group in ((0o600, 44444), (0o660, 0), (0o640, 44444), (0o604, 44444)):
        os.chown(device, 0, group)
        device.chmod(mode)
        with pytest.raises(UnsupportedError, match="nobody else may use"):
            groups_for(str(device))


def test_a_program_must_be_everybodys(tmp_path: Path) -> None:
    """What only root may run would not begin under another number: it is said before anything is started."""
    program = tmp_path / "monitor"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    check_reachable(SHIM, str(program))
    program.chmod(0o700)
    with pytest.raises(UnsupportedError, match="nobody else may run"):
        check_reachable(SHIM, str(program))
