"""QEMU's control socket (QMP): one command at a time, each answered within its time.

The monitor on the other side may have been taken over by its guest: a line has an end, so have the events that come
before an answer, and nothing it says is obeyed. Blocking; a broker calls it from a thread. Specification: QEMU's
docs/interop/qmp-spec.txt and qemu-qmp-ref(7).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from cloister.errors import StepError

MAX_LINE = 256 << 10
MAX_EVENTS = 1000
"""Lines that are no answer, before one that is."""
TIMEOUT_S = 10.0
_POLL_S = 0.002
_AT_ONCE_MS = 2_000_000
"""How long a machine may stand still for it: as long as can be said, so that it stops early and changes nothing."""
_UNBOUNDED = 1 << 40
"""Bytes a second: nobody else is on this line. QEMU's own bound would be 128 MiB."""
_SHARED = {"capability": "x-ignore-shared", "state": True}


class QmpError(StepError):
    """The monitor refused a command, said what no monitor says, or said nothing."""

    def __init__(self, message: str) -> None:
        """Say what was wrong."""
        super().__init__(
            "monitor-failed", message, remedy="cloister vm list, and the run's console: cloister vm console"
        )


class Qmp:
    """A conversation with one monitor. Owns the socket."""

    def __init__(self, sock: socket.socket, *, timeout_s: float = TIMEOUT_S) -> None:
        """Read the greeting and leave the mode in which only capabilities can be negotiated.

        Raises:
            QmpError: the other side is no monitor, or silent.
        """
        self._socket = sock
        self._timeout_s = timeout_s
        self._rest = b""
        self._deadline = time.monotonic() + timeout_s
        greeting = self._line()
        if not isinstance(greeting.get("QMP"), dict):
            raise QmpError("what answers on the control socket is no monitor")
        self.call("qmp_capabilities")

    def close(self) -> None:
        """Leave; the machine goes on."""
        self._socket.close()

    def call(self, command: str, *, descriptor: int | None = None, **arguments: Any) -> Any:
        """Send one command, with a descriptor where it takes one; return its result.

        Raises:
            QmpError: it was refused, or not answered in time.
        """
        self._deadline = time.monotonic() + self._timeout_s
        data = encode(command, arguments)
        try:
            self._socket.settimeout(self._timeout_s)
            if descriptor is None:
                self._socket.sendall(data)
            else:
                sent = socket.send_fds(self._socket, [data], [descriptor])
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise QmpError(f"the monitor takes no commands: {error.strerror or error}") from None
        for _ in range(MAX_EVENTS):
            answer = self._line()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"the monitor refuses {command}: {_words(answer['error'])}")
        raise QmpError(f"the monitor does not answer {command}")

    def migrate(self, descriptor: int, *, shared: bool, timeout_s: float = 60.0) -> None:
        """Write the machine's state into an open file; afterwards it stands still (`cont` lets it go on).

        Args:
            descriptor: a regular file, at the place where the state shall begin, or a pipe that somebody reads.
            shared: leave memory out that is shared with a file: that file has it already.
            timeout_s: for all of it.

        Raises:
            QmpError: the monitor failed.
        """
        self.call("migrate-set-capabilities", capabilities=[{**_SHARED, "state": shared}])
        self.call("migrate-set-parameters", **{"max-bandwidth": _UNBOUNDED, "downtime-limit": _AT_ONCE_MS})
        self.call("getfd", descriptor=descriptor, fdname="state")
        self.call("migrate", uri="fd:state")
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.call("query-migrate")
            told = status.get("status") if isinstance(status, dict) else None
            if told == "completed":
                return
            if told not in ("none", "setup", "active", "device", "pre-switchover") or time.monotonic() > deadline:
                raise QmpError(f"the machine's state was not written: {told}")
            time.sleep(_POLL_S)

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise QmpError("the monitor is silent")
            if len(self._rest) > MAX_LINE:
                raise QmpError(f"the monitor says a line of more than {MAX_LINE} bytes")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise QmpError(f"the monitor is gone: {error.strerror or error}") from None
            if not data:
                raise QmpError("the monitor is gone")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise QmpError("the monitor says what is not JSON") from None
        if not isinstance(value, dict):
            raise QmpError("the monitor says what is no object")
        return value


def _words(error: object) -> str:
    """Return what a monitor says of an error, as one short printable line."""
    told = str(error.get("desc", "")) if isinstance(error, dict) else ""
    return "".join(char for char in told[:200] if char.isprintable()) or "no reason given"


def connect(path: str, *, timeout_s: float = TIMEOUT_S) -> Qmp:
    """Return a conversation over a monitor's socket, waiting for it to be there.

    Raises:
        QmpError: nobody listens within the time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise QmpError("the monitor's control socket does not answer") from None
            time.sleep(_POLL_S)
            continue
        try:
            return Qmp(sock, timeout_s=timeout_s)
        except QmpError:
            sock.close()
            raise


def encode(command: str, arguments: dict[str, Any]) -> bytes:
    """Return one command as it is sent."""
    return json.dumps({"execute": command, "arguments": arguments}, ensure_ascii=True).encode() + b"\n"


def preload(commands: Sequence[tuple[str, dict[str, Any]]]) -> tuple[int, int]:
    """Return a descriptor for a monitor that finds these commands there, and its other end.

    The other end must stay open as long as the monitor lives: one that cannot answer drops what it has not read.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.sendall(b"".join(encode(command, arguments) for command, arguments in [("qmp_capabilities", {}), *commands]))
    return theirs.detach(), ours.detach()


def restore_orders(state: int, *, shared: bool) -> tuple[int, int]:
    """Return `preload` with what loads a machine's state, from the descriptor `state` of the monitor, and starts it.

    The machine has not moved anywhere, so the monitor shall not say on its behalf where its card is now (RARP).
    """
    return preload(
        [
            ("migrate-set-capabilities", {"capabilities": [{**_SHARED, "state": shared}]}),
            ("migrate-set-parameters", {"announce-rounds": 0}),
            ("migrate-incoming", {"uri": f"fd:{state}"}),
        ]
    )


def adopt(descriptor: int, *, timeout_s: float = TIMEOUT_S) -> Qmp:
    """Return a conversation over a connected socket.

    Raises:
        QmpError: the other side is no monitor, or silent.
    """
    sock = socket.socket(fileno=os.dup(descriptor))
    try:
        return Qmp(sock, timeout_s=timeout_s)
    except QmpError:
        sock.close()
        raise


def pair() -> tuple[int, int]:
    """Return our end of a control socket, and the monitor's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ours.detach(), theirs.detach()
