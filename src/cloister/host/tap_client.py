"""Asking `cloister-hostd` for a place on the bridge: the side of the user's own broker. Blocking, with a time limit.

The broker opens a listener on the bridge's address first and sends it along; back comes a tap for the monitor. Both end
with their descriptors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import NamedTuple

import msgspec

from cloister.errors import RetryError, UnsupportedError
from cloister.host.frames import FrameError, encode_list
from cloister.host.taps import read_network
from cloister.host.unit_wire import Wire, close_all
from cloister.plan.bridge import NETWORK_FILE, Tap
from cloister.plan.unit import HOSTD_SOCKET

ANSWER_S = 30.0
_TRIES = 3
"""The bridge may move between the look and the request."""
_BACKLOG = 128


class Given(NamedTuple):
    """What a guest has on the bridge; both descriptors are the caller's to close."""

    tap: Tap
    device: int
    """For the monitor: a tap of plain frames, without a header of virtio's (tun(4))."""
    listener: socket.socket
    """Where connections of the guest come in."""


def ask(run: str, path: str = HOSTD_SOCKET, network: str = NETWORK_FILE) -> Given:
    """Return a tap for a run, and the listener that is reached by it.

    Raises:
        UnsupportedError: `bridge-needs-setup`: this system has no bridge, or no hostd.
        RetryError: `tap-refused`, with the words of hostd, or it does not answer.
    """
    for tries in range(_TRIES):
        gateway = _gateway(network)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.bind((gateway, 0))
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            tap, device = _ask(run, listener.fileno(), path)
        except OSError as error:
            listener.close()
            if tries + 1 < _TRIES and _gateway(network) != gateway:
                continue
            message = f"the broker cannot listen on the bridge: {error.strerror or error}"
            raise RetryError("tap-refused", message, where=gateway, remedy="cloister status") from error
        except BaseException:
            listener.close()
            raise
        return Given(tap, device, listener)
    raise RetryError("tap-refused", "the bridge moves", remedy="try again")


def _gateway(network: str) -> str:
    try:
        return read_network(network).gateway
    except UnsupportedError as error:
        raise needs_setup() from error


def needs_setup() -> UnsupportedError:
    """Return what is said where this system has no bridge for microVMs."""
    return UnsupportedError(
        "bridge-needs-setup",
        'microvm.network = "bridge" needs a bridge that root sets up, and this system has none',
        where=".microvm.network",
        remedy='sudo cloister setup, with [microvm] users = ["YOU"] in /etc/cloister/cloister.toml; '
        'or network = "none": the proxy is reached over the guest\'s channel',
    )


def _ask(run: str, listener: int, path: str) -> tuple[Tap, int]:
    wire = Wire(_connect(path), ANSWER_S)
    try:
        fields = [b"verb=tap", f"run={run}".encode()]
        wire.send("L", encode_list(fields), (listener,))
        answer = wire.receive()
        if answer.kind == "F":
            close_all(answer.descriptors)
            said = answer.payload[1:].decode("utf-8", "replace")
            raise RetryError("tap-refused", f"no place on the bridge: {said}", where=path)
        if answer.kind != "J" or len(answer.descriptors) != 1:
            close_all(answer.descriptors)
            raise RetryError("tap-refused", "hostd said something else than a tap", where=path)
        try:
            return msgspec.json.decode(answer.payload, type=Tap), answer.descriptors[0]
        except msgspec.DecodeError as error:
            os.close(answer.descriptors[0])
            raise RetryError("tap-refused", f"what hostd said is not understood: {error}") from error
    except FrameError as error:
        raise RetryError("tap-refused", f"hostd went away: {error}", where=path, remedy="try again") from error
    finally:
        wire.close()


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(ANSWER_S)
    try:
        sock.connect(path)
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        raise needs_setup() from None
    except BaseException:
        sock.close()
        raise
    if uid != (0 if path == HOSTD_SOCKET else os.stat(path).st_uid):
        sock.close()
        raise RetryError("hostd-foreign", "the socket of cloister-hostd is not root's", where=path)
    return sock


def give_up(given: Given) -> None:
    """Close both ends: the tap is gone, and hostd forgets the guest."""
    with contextlib.suppress(OSError):
        os.close(given.device)
    given.listener.close()
