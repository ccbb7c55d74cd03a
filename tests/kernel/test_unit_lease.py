"""The lease of a run, as the system's broker holds it, towards a user's broker that may be hostile: real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cloister.host.frames import Channel, Frame, encode_list
from cloister.runs.active import ActiveRun
from cloister.runs.unit_lease import Lease
from cloister.services.connection import Connection

pytestmark = pytest.mark.kernel


class _Run:
    """What a lease needs of a run: it writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []
        self.plan = self.live = self
        self.run = "0123456789ab"

    def stop(self, grace_s: float) -> None:
        """Write it down."""
        self.said.append(("stop", grace_s))

    def refuse(self, reference: str, message: str, where: list[str]) -> None:
        """Write it down."""
        del message
        self.said.append((reference, where))

    def outer_closed(self) -> None:
        """Write it down."""
        self.said.append(("closed", None))


def played(play: Callable[[Channel], None], *, early: bool = False) -> list[tuple[str, Any]]:
    """Let a user's broker do something with a lease; return what the run was told, and which commands it was given."""
    run, ours = _Run(), socket.socketpair(socket.AF_UNIX)

    def execute(
        fields: dict[str, str], words: list[bytes], _env: list[bytes], link: Any, _fds: tuple[int, ...]
    ) -> None:
        run.said.append(("exec", (fields["run"], words)))
        link.close()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        lease = Lease(loop, lambda *about: Connection(loop, *about), ours[0])
        theirs = Channel(ours[1])
        if early:
            play(theirs)
            await asyncio.sleep(0.05)
        lease.serve(cast("ActiveRun", run), execute)
        if not early:
            play(theirs)
        await asyncio.sleep(0.05)
        run.said.append(("open", not lease.closed))
        theirs.close()
        await asyncio.sleep(0.05)
        lease.close()

    asyncio.run(main())
    return run.said


def ask(channel: Channel, fields: list[bytes], words: list[bytes] | None = None, passed: tuple[int, ...] = ()) -> None:
    """Send a whole request."""
    channel.send("L", encode_list(fields), passed)
    channel.send("V", encode_list(words or []))
    channel.send("N", encode_list([]))


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def test_an_orderly_lease() -> None:
    """Stop reaches the run, also when it was asked for before there was one; a closed lease ends it."""
    wanted = [("stop", 3.0), ("open", True), ("closed", None)]
    assert played(lambda channel: ask(channel, [b"verb=stop", b"grace=3"])) == wanted
    assert played(lambda channel: ask(channel, [b"verb=stop", b"grace=3"]), early=True) == wanted


def test_another_run_cannot_be_named() -> None:
    """A command over a lease is for the run of that lease, whatever the request names."""
    ends = socket.socketpair()
    with open(os.devnull, "rb") as null, ends[0], ends[1]:
        passed = (ends[0].fileno(), null.fileno(), null.fileno(), null.fileno())
        said = played(lambda channel: ask(channel, [b"verb=exec", b"run=zzzzzzzzzzzz"], [b"ls"], passed))
    assert said[0] == ("exec", ("0123456789ab", [b"ls"]))


def test_a_directory_as_a_stream(tmp_path: Path) -> None:
    """A directory among the streams of a command is refused in words to whoever asked; the run goes on."""
    ends = socket.socketpair()
    place = os.open(tmp_path, os.O_RDONLY)
    with open(os.devnull, "rb") as null, ends[0], ends[1]:
        passed = (ends[0].fileno(), place, null.fileno(), null.fileno())
        said = played(lambda channel: ask(channel, [b"verb=exec"], [b"ls"], passed))
        ends[1].setblocking(True)
        told = ends[1].recv(4096)
    os.close(place)
    assert said[0] == ("open", True)
    assert b"stdio-directory" in told


@pytest.mark.parametrize(
    "frames",
    [
        [Frame("V", encode_list([]))],
        [Frame("L", encode_list([])), Frame("L", encode_list([]))],
        [Frame("L", b"\xff\xff\xff\xff")],
        [Frame("X")],
    ],
)
def test_frames_that_belong_nowhere_end_the_lease(frames: list[Frame]) -> None:
    """Whoever does not keep to the protocol has no lease any more, and with it no run."""

    def play(channel: Channel) -> None:
        for frame in frames:
            channel.send(frame.kind, frame.payload)

    said = played(play)
    assert ("closed", None) in said
    assert ("open", False) in said


def test_descriptors_of_any_kind() -> None:
    """No socket as the link, too many descriptors or too few: nothing is run, and no descriptor stays open."""
    before = descriptors()
    with open(os.devnull, "rb") as null:
        for count in (0, 1, 4, 5, 16):
            said = played(lambda channel, n=count: ask(channel, [b"verb=exec"], [], (null.fileno(),) * n))
            assert said[0] == ("open", True)
    assert descriptors() <= before + 1
