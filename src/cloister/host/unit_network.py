"""Connecting a unit in mode `internet`: the unit of its network is started, and hands out the namespace.

The order is: the packet filter of the account is there (the floor has looked), pasta runs, the agent's unit is put into
the namespace, its first process is seen to be in it. The namespace is passed on by descriptor, which no name can
replace. What the shim in that unit says later goes to the system's broker.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import NamedTuple

import msgspec

from cloister.errors import RetryError, StepError, UnsupportedError
from cloister.host import unit_start
from cloister.host.addresses import nameservers
from cloister.host.firewall import Places
from cloister.host.frames import Frame, FrameError, encode_list
from cloister.host.memory_file import memory_file
from cloister.host.private_files import read
from cloister.host.unit_floor_network import TUN
from cloister.host.unit_wire import Wire
from cloister.plan.steps import Launch
from cloister.plan.unit import UnitLaunch

UP_S = 30.0
_NAMESPACES = 2 | 4
"""Flags of `B`: a user namespace and a network namespace (ARCHITECTURE.md, "Shim protocol")."""
_LOAD = ("-f", "/dev/fd/3")
_REPORT = ("-j", "list", "table", "inet", "cloister")
_ANYBODY = 0o006
_LARGEST_FILTER = 64 << 20


class Connected(NamedTuple):
    """A network that is up. Both descriptors are the caller's."""

    channel: int
    """Of the shim in the network's unit."""
    space: int
    """The network namespace."""


def connect(unit: UnitLaunch, launch: Launch) -> Connected:
    """Start the unit of a run's network, and return when pasta has connected the namespace.

    Raises:
        UnsupportedError: accounts may not use tap devices here, or pasta says that it cannot work.
        StepError: systemd made something else of the unit, or it does not keep to the protocol; nothing is left.
        RetryError: somebody does not answer.
    """
    assert unit.network is not None  # noqa: S101  who calls has looked
    _refuse_tap_devices()
    own = msgspec.structs.replace(unit, unit=unit.network.unit, properties=unit.network.properties, network=None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    wire = Wire(ours, UP_S)
    try:
        with theirs:
            starting = unit_start.Starting(
                unit_start.connect(), own, unit.network.argv, theirs.fileno(), shares=("net",)
            )
        try:
            _order(wire, launch)
        finally:
            os.close(starting.finish().pidfd)
        space = _namespace_of(wire)
        return Connected(os.dup(wire.fileno()), space)
    except BaseException:
        unit_start.stop(own.unit)
        raise
    finally:
        wire.close()


def check_inside(pid: int, space: int) -> None:
    """Refuse a first process that is in another network namespace than the one with pasta's interface.

    Raises:
        StepError: so it is.
    """
    try:
        there = os.stat(f"/proc/{pid}/ns/net")
    except OSError as error:
        raise StepError("unit-deviates", "its first process is gone") from error
    if not os.path.samestat(there, os.fstat(space)):
        raise StepError("unit-deviates", "systemd put the unit into another network namespace than it was told to")


def unknown_resolvers(places: Places = Places()) -> tuple[str, ...]:  # noqa: B008  # immutable
    """Return whom the host asks for names and the packet filter refuses to agents: it was made for others."""
    text = (read(places.file, _LARGEST_FILTER) or b"").decode("ascii", "replace")
    return tuple(one for one in nameservers() if f" daddr {one} udp dport 53 " not in text)


def _refuse_tap_devices() -> None:
    try:
        status = os.stat(f"/proc/1/root{TUN}")  # hostd has devices of its own
    except OSError:
        status = None
    if status is None or not stat.S_ISCHR(status.st_mode) or status.st_mode & _ANYBODY != _ANYBODY:
        raise UnsupportedError(
            "internet-unavailable", f'mode = "internet" needs tap devices, and accounts may not open {TUN}',
            where=TUN, remedy="sudo modprobe tun; sudo chmod 0666 /dev/net/tun",
        )  # fmt: skip


def _order(wire: Wire, launch: Launch) -> None:
    """Tell the shim which rules to load and how to start pasta; who leaves meanwhile is heard of later."""
    rules = memory_file("ruleset", launch.ruleset.encode())
    try:
        lists = (launch.pasta, (), (launch.nft, *_LOAD), (launch.nft, *_REPORT))
        payload = _NAMESPACES.to_bytes(4, "little") + b"".join(encode_list(map(os.fsencode, one)) for one in lists)
        wire.send("B", payload, (rules,))
    finally:
        os.close(rules)


def _namespace_of(wire: Wire) -> int:
    """Return the namespace that the shim hands out."""
    try:
        frame = wire.receive()
    except FrameError as error:
        raise StepError("network-failed", "the unit of the run's network ended at once") from error
    except RetryError as error:
        raise RetryError("network-slow", f"pasta was not ready within {UP_S:g} s", remedy="try again") from error
    if frame.kind == "F":
        said = "".join(char if char.isprintable() else " " for char in frame.payload[:1000].decode("utf-8", "replace"))
        raise UnsupportedError(
            "internet-unavailable", f'mode = "internet" does not work here: {said.strip()}', remedy="cloister doctor"
        )
    return _checked(frame)


def _checked(frame: Frame) -> int:
    """Return the descriptor of an `N`: a network namespace other than the host's."""
    if frame.kind == "N" and len(frame.descriptors) == 1:
        space = frame.descriptors[0]
        name = os.readlink(f"/proc/self/fd/{space}")
        if name.startswith("net:[") and not os.path.samestat(os.fstat(space), os.stat("/proc/1/ns/net")):
            return space
    for descriptor in frame.descriptors:
        os.close(descriptor)
    raise StepError("network-failed", "the unit of the run's network handed out something else than a namespace")
