"""`cloister-shim network` by its protocol, with stand-ins for pasta and nft: what it hands out, what ends it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from shim_rig import NETNS, USERNS, Rig, as_user, family, rig_of_test, wait_gone

from cloister.host import frames

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)
READY = "echo 1; exec sleep 600"
FLAGS = USERNS | NETNS


class Network:
    """One such process, and our end of its channel."""

    def __init__(self, rig: Rig) -> None:
        ours, theirs = socket.socketpair()
        self.channel = frames.Channel(ours)
        self.process = subprocess.Popen([str(rig.shim), "network"], stdin=theirs, **as_user())
        theirs.close()

    def order(self, pasta: str, *, flags: int = FLAGS, rules: str = "true", report: str = "echo counted") -> None:
        """Send the order, with shell scripts for what it starts."""
        lists = (("/bin/sh", "-c", pasta), (), ("/bin/sh", "-c", rules), ("/bin/sh", "-c", report))
        packed = b"".join(frames.encode_list([word.encode() for word in one]) for one in lists)
        self.channel.send("B", flags.to_bytes(4, "little") + packed)
        assert self.channel.flush()

    def frame(self) -> frames.Frame | None:
        """Return the next frame; None when the other end has left."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                if frame := self.channel.receive():
                    return frame
            except frames.FrameError:
                return None
            select.select([self.channel.fileno()], [], [], 0.2)
        raise AssertionError("it says nothing")


@pytest.fixture
def network(rig: Rig) -> Iterator[Network]:
    """One that was started; afterwards nothing of it lives."""
    made = Network(rig)
    yield made
    below = family(made.process.pid)
    made.channel.close()
    made.process.wait(5)
    assert not wait_gone(below)


def test_it_hands_out_a_namespace_and_its_counters(network: Network) -> None:
    """Once pasta is ready a network namespace comes, not ours; told to end, it reports and leaves."""
    network.order(READY)
    frame = network.frame()
    assert frame
    assert (frame.kind, len(frame.descriptors)) == ("N", 1)
    there = os.readlink(f"/proc/self/fd/{frame.descriptors[0]}")
    os.close(frame.descriptors[0])

    assert there.startswith("net:[")
    assert there != os.readlink("/proc/self/ns/net")
    network.process.send_signal(signal.SIGTERM)
    told = network.frame()
    assert told
    assert (told.kind, told.payload) == ("W", b"counted\n")
    assert network.process.wait(5) == 0


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (lambda one: one.order("echo no tap device >&2; exit 1"), b"pasta did not start: no tap device"),
        (lambda one: one.order("kill -9 $$"), b"pasta did not start: it was killed"),
        (lambda one: one.order(READY, rules="exit 1"), b"cannot load the nft rules"),
        (lambda one: one.order(READY, flags=USERNS), b"the order is malformed"),
        (lambda one: one.channel.send("B", b"\0\0"), b"the order is malformed"),
    ],
)
def test_what_fails_is_said(network: Network, order: Callable[[Network], None], said: bytes) -> None:
    """No namespace is handed out, and the reason is in words."""
    order(network)
    frame = network.frame()

    assert frame
    assert frame.kind == "F"
    assert said in frame.payload
    assert network.process.wait(5) == 125


def test_pastas_end_is_said_and_is_the_end(network: Network) -> None:
    """Nothing of it outlives pasta."""
    network.order("echo 1; echo the tap is gone >&2; exit 3")
    ready, over = network.frame(), network.frame()

    assert ready
    os.close(ready.descriptors[0])
    assert over
    assert (over.kind, over.payload) == ("F", b"pasta ended, and the network with it: the tap is gone\n")
    assert network.process.wait(5) == 125


def test_it_ends_with_its_channel(network: Network) -> None:
    """Who started it is gone: so is pasta, also while it is not ready."""
    network.order("exec sleep 600")
    time.sleep(0.1)
    below = family(network.process.pid)
    network.channel.close()

    network.process.wait(5)
    assert not wait_gone(below)
