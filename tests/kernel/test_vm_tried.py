"""What has to be found out by a boot holds up neither the broker's loop nor other runs, and its caller is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from cloister.errors import UnsupportedError
from cloister.host import firecracker_probe, vm_probe
from cloister.runs import prepare_vm, vm_accelerator
from cloister.runs.prepare import Kitchen, Looked
from cloister.runs.vm_accelerator import Guest, accelerator
from cloister.runs.vm_tried import Tried, tell

pytestmark = pytest.mark.kernel
BOOT_S = 0.6


class Place:
    """Stands for what a run asks for; `root` is its workspace."""

    agent = resolved = None

    def __init__(self, root: str = "/nowhere") -> None:
        self.layout, self.root = self, root


class Host:
    """A host on which a boot takes a while, and its answer is kept, or is not."""

    def __init__(self, *, keeps: bool = True, fails: bool = False) -> None:
        self.boots, self.keeps, self.fails, self.answer = 0, keeps, fails, ""

    def machine_facts(
        self, _kitchen: object, _agent: object, _resolved: object, workspace: str, trying: Callable[[str], None] = print
    ) -> str:
        """Boot where no answer is there; a run in /known needs none."""
        if workspace == "/known":
            return "known"
        if not self.answer:
            trying("trying something")
            self.boots += 1
            time.sleep(BOOT_S)
            if self.fails:
                raise UnsupportedError("qemu-missing", "there is none")
            if not self.keeps:
                return "tcg"
            self.answer = "tcg"
        return self.answer


def tried(host: Host, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """Return what is under test, on this host; needs a running loop."""
    monkeypatch.setattr(prepare_vm, "machine_facts", host.machine_facts)
    return Tried(asyncio.get_running_loop(), cast("Kitchen", None))


@pytest.fixture
def null() -> Iterator[int]:
    """A caller's standard error that nobody reads."""
    with open(os.devnull, "wb") as file:
        yield file.fileno()


def machine(under_test: Tried, stderr: int, root: str = "/nowhere") -> Any:
    """Ask for the machine of a run."""
    return under_test.machine(cast("Looked", Place(root)), stderr)


def test_a_boot_holds_up_neither_the_loop_nor_others(monkeypatch: pytest.MonkeyPatch, null: int) -> None:
    """Five starts that need the answer cost one boot; a start that needs none, and the loop, go on meanwhile."""
    host = Host()

    async def all_of_them() -> tuple[list[Any], int, float]:
        under_test = tried(host, monkeypatch)
        asked = [asyncio.ensure_future(machine(under_test, null)) for _ in range(5)]
        turns, started = 0, time.monotonic()
        await asyncio.sleep(0.05)
        known = await machine(under_test, null, "/known")
        took = time.monotonic() - started
        while not all(one.done() for one in asked):
            turns += 1
            await asyncio.sleep(0.01)
        return [known, *(one.result() for one in asked)], turns, took

    found, turns, took = asyncio.run(all_of_them())

    assert found == ["known", *["tcg"] * 5]
    assert host.boots == 1
    assert turns > 10
    assert took < BOOT_S


def test_who_waits_is_told_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line stands on the caller's standard error before the boot is over; where an answer is kept there is none."""
    reader, writer = os.pipe()

    async def twice() -> bytes:
        under_test = tried(Host(), monkeypatch)
        asked = asyncio.ensure_future(machine(under_test, writer))
        await asyncio.sleep(BOOT_S / 2)
        said = os.read(reader, 1000)
        await asked
        await machine(under_test, writer)
        return said

    said = asyncio.run(twice())
    os.close(writer)

    assert said == b"cloister: trying something\n"
    assert os.read(reader, 1000) == b""
    os.close(reader)


def test_an_answer_that_cannot_be_kept_is_found_again_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch, null: int
) -> None:
    """Without a place for the answer each start boots; none of them on the loop, and not two at once."""
    host = Host(keeps=False)

    async def two() -> float:
        under_test = tried(host, monkeypatch)
        started = time.monotonic()
        await asyncio.gather(*(machine(under_test, null) for _ in range(2)))
        return time.monotonic() - started

    assert asyncio.run(two()) >= 2 * BOOT_S
    assert host.boots == 2


def test_a_boot_that_fails_is_told_to_who_asked(monkeypatch: pytest.MonkeyPatch, null: int) -> None:
    """Its error is the start's, and the next one tries again."""
    host = Host(fails=True)

    async def twice() -> None:
        under_test = tried(host, monkeypatch)
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="there is none"):
                await machine(under_test, null)

    asyncio.run(twice())
    assert host.boots == 2


def test_a_caller_who_reads_nothing_is_not_waited_for() -> None:
    """A full pipe, a closed one and a file that cannot be written are passed over, at once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(65536)):
            pass
    os.set_blocking(writer, True)
    started = time.monotonic()
    tell(writer, "anything")
    os.close(reader)
    tell(writer, "anything")
    os.close(writer)
    with open("/dev/full", "wb") as full, open(os.devnull, "rb") as unwritable:
        tell(full.fileno(), "anything")
        tell(unwritable.fileno(), "anything")
    assert time.monotonic() - started < 1


def test_nothing_is_started_before_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both questions that boot are told beforehand, with their bound; told no, they start nothing."""
    monkeypatch.setattr(vm_probe, "why_not_kvm", lambda: "")
    program, started = tmp_path / "monitor", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\necho {vm_probe.HELLO.decode()}\n")
    program.chmod(0o755)
    told: list[str] = []

    def no(words: str) -> None:
        told.append(words)
        raise KeyError(words)

    with pytest.raises(KeyError):
        accelerator(str(program), Guest("k", "i", "0"), str(tmp_path / "run"), no)
    with pytest.raises(KeyError):
        firecracker_probe.probe(str(program), "k", "i", str(tmp_path / "kept"), no)
    assert not started.exists()
    assert accelerator(str(program), Guest("k", "i", "0"), str(tmp_path / "run"), told.append).seconds > 0
    assert started.exists()
    assert accelerator(str(program), Guest("k", "i", "0"), str(tmp_path / "run"), no).seconds > 0
    assert told == [vm_accelerator.WORDS, firecracker_probe.WORDS, vm_accelerator.WORDS]
    assert all("at most" in words for words in told)
