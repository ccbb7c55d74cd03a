"""Asking the sensor to watch a run: one frame with a descriptor, one answer. For hostd and the user's broker.

    W  JSON: run, agent, user, account · a cgroup's directory or a pid namespace   →   W  JSON: watch, tiers
                                                                                   →   F  JSON: why it is refused

When the answer is there, everything the run does from then on is seen: so it is asked for before the agent's go. A
cgroup's watch ends with the cgroup, a namespace's when this connection is closed. It blocks, for five seconds at most.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from cloister.errors import StepError
from cloister.host.frames import Channel, FrameError

SENSOR_SOCKET = "/run/cloister/sensor.sock"
TIMEOUT_S = 5.0


class Told(msgspec.Struct, frozen=True):
    """A watch, as the keeper is told: its number stands in its events."""

    watch: int
    slot: int
    fields: dict[str, str]
    resumed: Literal["", "again", "ended"] = ""
    """The sensor was restarted: it watches this run again, or the run was over by then; unseen meanwhile."""
    at: int = 0
    """When that was, in nanoseconds since the epoch."""


class Rings(msgspec.Struct, frozen=True):
    """What the keeper must know of the rings, besides their descriptors."""

    critical_bytes: int
    bulk_bytes: int
    machine: str
    tiers: dict[str, str]
    watches: list[Told]


class Sums(msgspec.Struct, frozen=True):
    """What the kernel counted for a watch since it began."""

    watch: int
    tallies: list[tuple[int, ...]]
    """Of the critical and the bulk ring: made, dropped, limited."""
    calls: dict[int, int] = {}
    """How often each system call was made, when the watch is over."""


class Missed(msgspec.Struct, frozen=True):
    """What no counter of a watch knows of: programs that did not run."""

    total: int
    """How often the kernel left a program of ours out since the sensor began, because that program ran on the CPU."""


class Asked:
    """A watch that was granted."""

    def __init__(self, channel: Channel, number: int, tiers: Mapping[str, str]) -> None:
        self._channel, self.number, self.tiers = channel, number, tiers

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self._channel.fileno()

    def close(self) -> None:
        """Let go: a namespace is watched no longer."""
        self._channel.close()


def ask(
    descriptor: int, fields: Mapping[str, str], path: str = SENSOR_SOCKET, *, timeout_s: float = TIMEOUT_S
) -> Asked:
    """Have a cgroup or pid namespace watched, and return when it is.

    Raises:
        StepError: the sensor refuses.
        OSError: there is no sensor, or it is silent.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout_s)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    channel = Channel(sock)
    try:
        channel.send("W", msgspec.json.encode(dict(fields)), [descriptor])
        kind, answer = _answer(channel, timeout_s)
    except BaseException:
        channel.close()
        raise
    if kind != "W":
        channel.close()
        raise StepError("kernel-watch-refused", f"the sensor does not watch this run: {answer.get('why', '')}")
    return Asked(channel, int(answer["watch"]), answer["tiers"])


def _answer(channel: Channel, timeout_s: float) -> tuple[str, dict[str, Any]]:
    until = time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0:
        select.select([channel], [], [], left)
        frame = channel.receive()
        if frame is not None:
            return frame.kind, msgspec.json.decode(frame.payload)
    raise FrameError("the sensor is silent")
