"""Disks as a real guest's kernel writes them: all of its work comes back, also from a machine that was killed."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.guest_user import BOOT_S, GuestUser, Installs
from support.homes import make_home, make_workspace
from support.terminal import Terminal

WORK = r"""
import hashlib, os, stat
for n in range(300): open(f"many/name-of-some-length-{n}", "w").write(str(n))
for n in range(0, 300, 3): os.unlink(f"many/name-of-some-length-{n}")
os.rename("old/deep", "moved")
with open("big", "r+b") as f: f.seek(1 << 20); f.write(b"changed"); f.truncate((3 << 20) + 5)
with open("holes", "wb") as f:
    for n in range(0, 60): f.seek(n << 16); f.write(b"%d" % n)
    f.truncate(16 << 20)
os.posix_fallocate(os.open("reserved", os.O_CREAT | os.O_RDWR, 0o600), 0, 1 << 20)
os.chmod("script", 0o755); os.unlink("gone"); os.rmdir("empty")
os.symlink("big", "link"); os.symlink("x/" * 300, "long"); os.link("big", "again")
os.unlink("kind"); os.mkdir("kind"); open("kind/file", "w").write("now a directory")
open(b"\xff\xfe\n strange", "wb").write(b"name"); os.mkfifo("pipe")
os.makedirs("/".join("d%d" % n for n in range(40))); open("a", "a").write("appended")
os.utime("touched"); os.chmod("mode", 0o2750)
def look(top=b"."):
    for place, ds, fs in os.walk(top):
        for name in ds + fs:
            path = os.path.join(place, name); s = os.lstat(path); kind = stat.S_IFMT(s.st_mode)
            if path.startswith(b"./.git") or kind == stat.S_IFIFO: continue
            if kind == stat.S_IFREG: what = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
            else: what = os.readlink(path).decode() if kind == stat.S_IFLNK else "directory"
            yield path, what, 0 if kind == stat.S_IFLNK else s.st_mode & 0o777
open("/var/tmp/seen", "w").write("\n".join(sorted(map(repr, look()))))
"""


class Guests:
    """A user, the workspace, and what was in it before."""

    def __init__(self, image: Installs, place: Path, *tables: str) -> None:
        self.home = make_home(place / "home")
        self.workspace = make_workspace(self.home / "src/project")
        for name in ("old/deep", "many", "empty"):
            (self.workspace / name).mkdir(parents=True)
        (self.workspace / "old/deep/file").write_text("moved with its directory")
        (self.workspace / "big").write_bytes(os.urandom(2 << 20))
        for name in ("a", "script", "gone", "kind", "touched", "mode"):
            (self.workspace / name).write_text(name)
        self.user = GuestUser(self.home, image, *tables)

    def record(self) -> dict[str, object]:
        """The last receipt."""
        return self.user.receipts()[-1]


@pytest.fixture(scope="module")
def guests(image: Installs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    """One user for the runs of this file, in mode `direct`."""
    made = Guests(image, tmp_path_factory.mktemp("disks"))
    yield made
    made.user.close()


def test_all_of_a_guests_work_comes_back(guests: Guests) -> None:
    """What a program in the guest did to files, by a real kernel, is what the host has at the end, to the byte."""
    done = guests.user.run("run", "shell", "--", "python3", "-c", WORK, cwd=guests.workspace, timeout_s=BOOT_S)
    assert done.returncode == 0, done.stderr
    again = guests.user.inside("cat /var/tmp/seen", cwd=guests.workspace)
    assert again.returncode == 0, again.stderr
    inside = again.stdout.splitlines()
    outside = sorted(map(repr, look(guests.workspace)))
    held = [line for line in inside if line not in outside]
    assert not [line for line in outside if line not in inside]
    assert all(line.startswith(("(b'./.", "(b'./HEAD'", "(b'./refs'")) for line in held), "names kept from being made"
    assert (guests.workspace / "holes").stat().st_blocks * 512 < 1 << 20
    assert not (guests.workspace / "pipe").exists()
    assert not list(guests.user.state.glob("runs/*/overlay"))


def look(top: Path) -> Iterator[tuple[bytes, str, int]]:
    """Say what is there in the words of the program above."""
    root = os.fsencode(top)
    for place, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(place, name)
            status = os.lstat(path)
            shown = b"." + path[len(root) :]
            if shown.startswith(b"./.git") or stat.S_ISFIFO(status.st_mode):
                continue
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    what = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                what = os.fsdecode(os.readlink(path)) if stat.S_ISLNK(status.st_mode) else "directory"
            yield shown, what, 0 if stat.S_ISLNK(status.st_mode) else status.st_mode & 0o777


def test_a_killed_machine_loses_only_what_was_not_synced(guests: Guests) -> None:
    """What it had synced comes back, since its disk is replayed; its `/var` is repaired at the next start."""
    script = "echo synced > synced; echo kept > /var/tmp/kept; sync; touch ready; sync; while :; do date >> busy; done"
    run = guests.user.begin(script, cwd=guests.workspace)
    guests.user.exec(run, "while [ ! -e ready ]; do sleep 0.1; done", cwd=guests.workspace)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            home = (folder / "root/run/cloister/box").stat() if b"qemu" in words[0] else None
        except OSError:
            continue
        mine = guests.user.runtime / f"cloister/runs/{run}/box"
        if home and mine.exists() and os.path.samestat(home, mine.stat()):
            os.kill(int(folder.name), signal.SIGKILL)
    deadline = time.monotonic() + BOOT_S
    while guests.user.receipts()[-1]["id"] != run and time.monotonic() < deadline:
        time.sleep(0.1)
    assert guests.record()["reason"] == "monitor-died", guests.record()
    assert (guests.workspace / "synced").read_text() == "synced\n", guests.record()
    again = guests.user.inside("cat /var/tmp/kept", cwd=guests.workspace)
    assert again.stdout == "kept\n", again.stderr


def test_protected_names_are_read_only_inside_and_ask_outside(guests: Guests) -> None:
    """The agent cannot write what tools of the host load, present or not, and can write what lies beside it."""
    (guests.workspace / ".git/hooks").mkdir(parents=True, exist_ok=True)
    done = guests.user.inside(
        "echo x > .git/hooks/pre-commit; mkdir .vscode/x; echo x > .envrc; echo fine > fine", cwd=guests.workspace
    )
    assert done.stderr.count("Read-only file system") == 3, done.stderr
    assert (guests.workspace / "fine").read_text() == "fine\n"
    assert not (guests.workspace / ".vscode").exists()


def test_a_hidden_file_is_not_in_the_guest(image: Installs, tmp_path: Path) -> None:
    """Neither its content nor its bytes on any disk; in mode `overlay` the rest waits for `cloister apply`."""
    tables = '[agents.shell.workspace]\nmode = "overlay"\n', '[agents.shell.filesystem]\nhide = [".env"]\n'
    guests = Guests(image, tmp_path, *tables)
    (guests.workspace / ".env").write_text("canary-hidden")
    done = guests.user.inside(
        "cat .env; rm -f .env; echo new > new; grep -r canary . && echo found", cwd=guests.workspace
    )
    shown = guests.user.run("diff", "last", "--stat", cwd=guests.workspace)
    applied = guests.user.run("apply", "last", cwd=guests.workspace)
    guests.user.close()
    assert "canary" not in done.stdout
    assert "found" not in done.stdout
    assert shown.stdout.split() == ["A", "new"]
    assert applied.returncode == 0
    assert (guests.workspace / ".env").read_text() == "canary-hidden"


@pytest.mark.slow
def test_a_start_that_is_given_up_while_it_fills_leaves_nothing(image: Installs, tmp_path: Path) -> None:
    """On a terminal it says how far it is; after Ctrl-C nothing of the run is there, and the broker serves others."""
    made = Guests(image, tmp_path)
    many = made.workspace / "tree"
    for index in range(40_000):
        if index % 100 == 0:
            (many / f"{index}").mkdir(parents=True)
        (many / f"{index // 100 * 100}/{index}").write_bytes(b"x")
    try:
        words = made.user.command("run", "shell", "--", "true")
        with Terminal(words, cwd=made.workspace, env=made.user.environment) as terminal:
            terminal.until("filling the virtual machine's disk: ", BOOT_S)
            terminal.until(" files", BOOT_S)
            began = time.monotonic()
            terminal.type("\x03")
            assert terminal.wait() == 130
            assert time.monotonic() - began < 5
            assert terminal.restored
        deadline = time.monotonic() + 20
        while list(made.user.state.glob("runs/*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not list(made.user.state.glob("runs/*"))
        piped = made.user.run("run", "shell", "--json", "--", "true", cwd=made.workspace, timeout_s=BOOT_S)
        assert "filling" not in piped.stderr + piped.stdout
    finally:
        made.user.close()
