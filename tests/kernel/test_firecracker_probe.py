"""Whether Firecracker boots a guest here is asked once, bounded, and believed of that program only."""

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from cloister.host.firecracker_probe import Verdict, probe, try_boot

pytestmark = pytest.mark.kernel
BOOTS = 'echo boot >> "{log}"; echo "cloister: hello from a guest"'


class Guest(NamedTuple):
    """Files that stand for a kernel and an initramfs."""

    kernel: str
    initramfs: str


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    """What would be booted."""
    for name in ("vmlinux", "initramfs.cpio"):
        (tmp_path / name).write_bytes(b"x")
    return Guest(str(tmp_path / "vmlinux"), str(tmp_path / "initramfs.cpio"))


def alive(group: str) -> bool:
    """Return whether anything but a zombie is left of a process group."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(path.read_text(errors="replace").rpartition(") ")[2].split())
    return any(words[2] == group and words[0] != "Z" for words in stats)


def program(tmp_path: Path, body: str) -> str:
    """Make a Firecracker that says its version, and does this instead of booting."""
    path = tmp_path / "firecracker"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "Firecracker v1.16.1"; exit 0; }\n'
        f'[ "$1 $2" = "--no-api --config-file" ] || exit 9\n{body.format(log=tmp_path / "log")}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_one_that_boots_is_asked_once(tmp_path: Path, guest: Guest) -> None:
    """The answer is kept; another program, or another kernel, is tried again."""
    one, kept, log = program(tmp_path, BOOTS), str(tmp_path / "kept" / "answer"), tmp_path / "log"

    first = probe(one, *guest, kept)
    assert (first.seconds > 0, first.version, first.why) == (True, "Firecracker v1.16.1", "")
    assert probe(one, *guest, kept) == first
    assert log.read_text() == "boot\n"
    os.utime(guest.kernel, (1, 1))
    assert probe(one, *guest, kept).seconds
    assert log.read_text() == "boot\nboot\n"
    Path(one).write_text(Path(one).read_text() + "# changed\n")
    assert probe(one, *guest, kept).seconds
    assert log.read_text() == "boot\nboot\nboot\n"


@pytest.mark.parametrize("spoilt", ["", "{}", '[["x"],{"seconds":1}]', "\x00" * 1000])
def test_a_spoilt_answer_is_asked_anew(tmp_path: Path, guest: Guest, spoilt: str) -> None:
    """What is kept and cannot be read, or is about something else, counts for nothing."""
    kept = tmp_path / "kept"
    kept.write_text(spoilt)

    assert not probe(program(tmp_path, "exit 1"), *guest, str(kept)).seconds


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("exit 1", "the monitor ended: without a word"),
        ("echo 'Cannot open /dev/kvm'; exit 1", "the monitor ended: Cannot open /dev/kvm"),
        ("echo 'cloister: hullo from a guest'; exit 0", "the monitor ended: cloister: hullo"),
        ("printf 'no\\033[2J'; exit 0", "the monitor ended: no?[2J"),
        ("head -c 200000 /dev/zero | tr '\\0' a; sleep 100", "the monitor ended: aaa"),
    ],
)
def test_what_is_no_boot(tmp_path: Path, guest: Guest, body: str, why: str) -> None:
    """Only a guest that greets is one that boots; else the last line says why, cut and harmless."""
    verdict = try_boot(program(tmp_path, body), *guest)

    assert not verdict.seconds
    assert verdict.why.startswith(why)


def test_one_that_hangs_is_ended(tmp_path: Path, guest: Guest) -> None:
    """A guest that never speaks costs the bound and no more, and its monitor is gone afterwards."""
    began = time.monotonic()
    verdict = try_boot(program(tmp_path, "echo $$ > '{log}'; exec sleep 1000"), *guest, bound_s=0.5)

    assert verdict == Verdict(version="Firecracker v1.16.1", why="a guest said nothing for 0.5 s")
    assert time.monotonic() - began < 10
    assert not alive((tmp_path / "log").read_text().strip())


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/nowhere\n", "\x7fELF"])
def test_what_is_no_firecracker(tmp_path: Path, guest: Guest, text: str) -> None:
    """A program that does not say a version, or cannot be started, boots nothing."""
    path = tmp_path / "firecracker"
    path.write_text(text)
    path.chmod(0o755)

    assert try_boot(str(path), *guest) == Verdict(version="", why="it does not say its version")
