"""A request to hostd for a tap: a user's microVM gets an interface on the bridge, and reaches its own run's listener.

The caller brings the listener that its broker serves: whoever holds such a socket may be reached by it, so no port is
believed that is only named. Who asks is the kernel's word, whether they may stands in `system.json`. The tap goes back
as a descriptor and ends with it; there is no request to give one back.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import Callable

import msgspec

from cloister.errors import CloisterError, DeniedError, RetryError, UsageError
from cloister.host import taps
from cloister.host.frames import Frame, FrameError, decode_list
from cloister.host.rtnetlink import Rtnetlink
from cloister.host.unit_caller import Caller
from cloister.host.unit_grants import read_system
from cloister.host.unit_wire import Wire, close_all, read_fields
from cloister.plan.bridge import Tap
from cloister.plan.unit import AUDIT_SOCKET, System

_FIELDS = frozenset({"verb", "run"})
_RUN = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")
Record = Callable[[Tap], str]
"""Writes down what is given; returns why it could not, or nothing."""


def is_tap(frame: Frame) -> bool:
    """Whether a first frame asks for a tap; its descriptors stay open."""
    with contextlib.suppress(FrameError):
        return b"verb=tap" in decode_list(frame.payload)[0]
    return False


def serve(wire: Wire, first: Frame, caller: Caller, record: Record) -> None:
    """Make a tap and send it.

    Raises:
        UsageError: the request is malformed.
        DeniedError: `bridge-not-granted`, or the listener is none.
        CloisterError: there is no bridge, its filter is not whole, or the user has too many.
        FrameError: the caller left.
    """
    try:
        run = _run_of(read_fields(first, _FIELDS), first.descriptors)
        system = read_system()
        _check_grant(system, caller)
        port = _check_listener(first.descriptors[0])
        tap, descriptor = taps.make(caller.uid, run, port)
    finally:
        close_all(first.descriptors)
    try:
        why = record(tap)
        if why and system.audit == "stop":
            message = f"what agents do cannot be recorded, so no guest is connected: {why}"
            raise RetryError("audit-lost", message, where=AUDIT_SOCKET, remedy="systemctl status cloister-auditd")
        wire.send("J", msgspec.json.encode(tap), (descriptor,))
    finally:
        os.close(descriptor)


def tidy() -> None:
    """Take back what belongs to no tap any more; where there is no bridge there is nothing."""
    with contextlib.suppress(CloisterError, OSError), taps.locked(), Rtnetlink() as kernel:
        taps.reconcile(kernel)


def _run_of(fields: dict[str, str], descriptors: tuple[int, ...]) -> str:
    if fields.get("verb") != "tap" or not _RUN.fullmatch(fields.get("run", "")):
        raise UsageError("request-malformed", "a request for a tap names its run")
    if len(descriptors) != 1:
        raise UsageError("request-malformed", f"{len(descriptors)} descriptors came with a request for a tap")
    return fields["run"]


def _check_grant(system: System, caller: Caller) -> None:
    if system.bridge is None or caller.name not in system.bridge.users:
        raise DeniedError(
            "bridge-not-granted", f"user {caller.name!r} may not connect microVMs to the bridge",
            remedy=f'the owner of this system adds [microvm] users = ["{caller.name}"] to its policy',
        )  # fmt: skip


def _check_listener(descriptor: int) -> int:
    """Return the port of a socket that listens on the bridge's address, and nowhere else.

    Raises:
        DeniedError: `listener-unfit`.
    """
    gateway = taps.read_network().gateway
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listening and (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM):
                    address, port = sock.getsockname()
                    if address == gateway and sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == socket.IPPROTO_TCP:
                        return int(port)
    except OSError as error:
        raise DeniedError("listener-unfit", f"the listener is not understood: {error.strerror}") from error
    raise DeniedError("listener-unfit", f"it must be a TCP socket that listens on {gateway} alone", where=gateway)


_SO_PROTOCOL = 38
"""socket(7); Python names it on no platform."""
