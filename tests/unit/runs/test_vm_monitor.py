"""Which monitor a run gets: the one that is asked for or a refusal, and Firecracker only where it boots a guest."""

import os
from pathlib import Path

import pytest

from cloister.errors import UnsupportedError
from cloister.host.firecracker_probe import Verdict
from cloister.runs.vm_monitor import Choice, Wanted, choose, find

GOOD = Verdict(version="Firecracker v1.16.1", seconds=0.1)
DEAD = Verdict(version="Firecracker v1.16.1", why="a guest said nothing for 30 s")
OLD = Verdict(version="Firecracker v1.7.0", seconds=0.1)
STRANGE = Verdict(version="", why="it does not say its version")
PROGRAM = "/usr/local/bin/firecracker"
QEMU, FIRECRACKER = Choice("qemu", ""), Choice("firecracker", PROGRAM)


@pytest.mark.parametrize(
    ("monitor", "kvm", "program", "verdict", "chosen"),
    [
        ("auto", True, PROGRAM, GOOD, FIRECRACKER),
        ("auto", True, PROGRAM, DEAD, QEMU),
        ("auto", True, PROGRAM, OLD, QEMU),
        ("auto", True, "", GOOD, QEMU),
        ("auto", False, PROGRAM, GOOD, QEMU),
        ("qemu", True, PROGRAM, GOOD, QEMU),
        ("firecracker", True, PROGRAM, GOOD, FIRECRACKER),
        ("firecracker", False, PROGRAM, GOOD, FIRECRACKER),
    ],
)
def test_the_monitor_of_a_run(monitor: str, kvm: bool, program: str, verdict: Verdict, chosen: Choice) -> None:
    """`auto` takes Firecracker where KVM boots guests and it does too; who is named is taken."""
    assert choose(Wanted(monitor, "none"), kvm=lambda: kvm, program=program, attempt=lambda _: verdict) == chosen


@pytest.mark.parametrize(
    ("program", "verdict", "words"),
    [
        ("", GOOD, "no firecracker"),
        (PROGRAM, DEAD, "said nothing"),
        (PROGRAM, OLD, "older"),
        (PROGRAM, STRANGE, "version"),
    ],
)
def test_firecracker_by_name_is_never_replaced(program: str, verdict: Verdict, words: str) -> None:
    """Who asks for Firecracker by name gets a refusal with the reason where it cannot be, never QEMU."""
    with pytest.raises(UnsupportedError, match=words) as caught:
        choose(Wanted("firecracker", "none"), kvm=lambda: True, program=program, attempt=lambda _: verdict)
    assert caught.value.reference == "firecracker-unavailable"
    assert "qemu" in caught.value.remedy


def test_a_bridge_is_for_qemu() -> None:
    """Firecracker takes no tap by descriptor: by name it is refused, and `auto` takes QEMU without trying."""

    def attempt(_: str) -> Verdict:
        raise AssertionError("it was tried for nothing")

    assert choose(Wanted("auto", "bridge"), kvm=lambda: True, program=PROGRAM, attempt=attempt) == QEMU
    with pytest.raises(UnsupportedError) as caught:
        choose(Wanted("firecracker", "bridge"), kvm=lambda: True, program=PROGRAM, attempt=attempt)
    assert caught.value.reference == "firecracker-bridge"


def test_it_is_not_tried_where_nobody_asks() -> None:
    """A host without KVM, or a policy with QEMU, boots nothing to find out."""

    def attempt(_: str) -> Verdict:
        raise AssertionError("it was tried for nothing")

    assert choose(Wanted("auto", "none"), kvm=lambda: False, program=PROGRAM, attempt=attempt) == QEMU
    assert choose(Wanted("qemu", "none"), kvm=lambda: True, program=PROGRAM, attempt=attempt) == QEMU


def make(directory: Path, mode: int = 0o755) -> Path:
    """Make a program."""
    directory.mkdir(exist_ok=True)
    program = directory / "firecracker"
    program.write_text("#!/bin/sh\n")
    program.chmod(mode)
    return program


def test_where_it_is_found(tmp_path: Path) -> None:
    """It is found on the PATH, by its real path; relative directories and what cannot be run do not count."""
    program = make(tmp_path / "bin")
    make(tmp_path / "plain", 0o644)
    link = tmp_path / "links"
    link.mkdir()
    (link / "firecracker").symlink_to(program)

    assert find(f"bin:{tmp_path}/plain:{tmp_path}/links", owner=os.getuid()) == str(program)
    assert find(f"bin:{tmp_path}/plain", owner=os.getuid()) in {"", PROGRAM, "/usr/bin/firecracker"}


def test_where_it_does_not_count(tmp_path: Path) -> None:
    """One that others could have put there, or an agent, is passed over: it would be started outside of any sandbox."""
    program = make(tmp_path / "bin")
    search, me = str(program.parent), os.getuid()
    assert find(search, owner=me) == str(program)

    assert find(search, owner=me, forbidden=(str(tmp_path),)) != str(program)
    program.chmod(0o777)
    assert find(search, owner=me) != str(program)
    program.chmod(0o755)
    program.parent.chmod(0o777)
    assert find(search, owner=me) != str(program)
    program.parent.chmod(0o755)
    assert find(search, owner=me) == str(program)
