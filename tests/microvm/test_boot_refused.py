"""What does not boot: roots that are not what was signed, and command lines that ask for anything else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support import guest_machine
from support.guest_link import GuestLink, fields
from support.guest_machine import GuestMachine, Image, line

BLOCK = 4096
PROGRAM = "/usr/bin/git"
"""Large, and nothing that a boot reads."""


@pytest.fixture(scope="module")
def booted(image) -> Image:
    """What the tests' image starts from."""
    return guest_machine.of(image)


@pytest.fixture
def copied(booted: Image, tmp_path: Path) -> Image:
    """The same with a root of its own, to be changed."""
    root = tmp_path / "root.img"
    shutil.copyfile(booted.root, root)
    return booted._replace(root=root)


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def place_of(root: Path, program: str) -> int:
    """Return where in the image a file's first bytes are, as erofs-utils sees it."""
    shown = subprocess.run(["dump.erofs", f"--path={program}", "-e", root], check=True, capture_output=True, text=True)
    found = re.search(r"^ *0: +0\.\. *\d+ \| +\d+ : +(\d+)\.\.", shown.stdout, re.MULTILINE)
    assert found, shown.stdout
    return int(found[1])


def ended(image: Image, cmdline: str) -> str:
    """Boot, and return what was on the console when the machine was off; it must not get as far as a run."""
    with GuestMachine(image, cmdline) as machine:
        shown = machine.ended()
        assert machine.channel.recv(1) == b"", "the guest spoke"
    return shown


@pytest.mark.parametrize(
    ("where", "what"),
    [
        pytest.param(lambda _: 1024, "corrupted", id="superblock"),
        pytest.param(lambda table: int(table.split(":")[1]) * BLOCK + 40, "corrupted", id="tree"),
    ],
)
def test_one_changed_bit_ends_the_boot(copied: Image, where, what: str) -> None:
    """One bit in the file system's superblock or in the hash tree: a panic before anything of the root has run."""
    flip(copied.root, where(copied.verity))
    shown = ended(copied, line(copied))
    assert "Kernel panic" in shown
    assert what in shown


def test_one_changed_bit_of_a_file_ends_the_run_when_it_is_read(copied: Image) -> None:
    """One bit in a file: the guest boots, reads other files, and ends when that block is read."""
    flip(copied.root, place_of(copied.root, PROGRAM) + 100)
    with GuestMachine(copied, line(copied)) as machine:
        link = GuestLink(machine.channel)
        link.join()
        link.begin(fields())
        assert link.shell("cat /usr/bin/bash | wc -c").status == 0
        with pytest.raises((AssertionError, ConnectionError)):
            link.shell(f"cat {PROGRAM} | wc -c")
        shown = machine.ended()
    assert "data block" in shown
    assert "Kernel panic" in shown


@pytest.mark.parametrize("part", [pytest.param(2, id="root-hash"), pytest.param(3, id="salt", marks=pytest.mark.slow)])
def test_another_hash_or_salt_boots_nothing(booted: Image, part: int) -> None:
    """A guest whose command line has another root hash, or another salt, panics at the first block."""
    words = booted.verity.split(":")
    words[part] = f"{'0' if words[part][0] != '0' else '1'}{words[part][1:]}"
    shown = ended(booted, line(booted, verity=f"cloister.verity={':'.join(words)}"))
    assert "Kernel panic" in shown


def test_a_root_that_can_be_written_is_refused(copied: Image) -> None:
    """The guest does not start from a disk that it could write."""
    with GuestMachine(copied, line(copied), writable_root=True) as machine:
        assert "it can be written" in machine.ended()


@pytest.mark.parametrize(
    ("verity", "more"),
    [
        pytest.param("", "", id="no-root"),
        pytest.param(None, "cloister.verity=1:2:{hash}:{hash}", id="two-roots"),
        pytest.param(None, "init=/bin/sh", id="another-init", marks=pytest.mark.slow),
    ],
)
def test_a_command_line_with_anything_else_is_refused(booted: Image, verity: str | None, more: str) -> None:
    """Without a verity table, with two, or with another first program nothing starts, and the console says why."""
    shown = ended(booted, line(booted, verity=verity, more=more.format(hash="0" * 64)))
    assert "the guest does not start: the command line" in shown
    assert "Kernel panic" not in shown
