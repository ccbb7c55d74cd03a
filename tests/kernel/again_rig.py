"""A monitor's vsock between a keeper and the real guest's end of the link: what it carries can be cut, at either end.

As Firecracker's: a program that makes a socket, on which the keeper writes `CONNECT 5000`. Here a thread of the test is
that program; the guest accepts on a socket of its own, as PID 1 of a machine does on its vsock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import Literal

from keeper_rig import Keeper, Place, machine, memory
from kept_guest import AS_CHANNEL
from shim_rig import as_user, seccomp_without_userns

Answer = Literal["serve", "refuse", "silence", "nobody"]
"""What a call finds: the guest; a closed connection; no answer; an answer behind which nobody speaks."""


class Vsock:
    """The real guest's end, and the socket by which it is reached."""

    def __init__(self, place: Place) -> None:
        self.place, self.answer, self.calls = place, "serve", 0
        self.forgets = 0
        """So many connections more the guest is made to forget as soon as they are there."""
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._ended: list[tuple[socket.socket, socket.socket]] = []
        self._idle: list[socket.socket] = []
        guest, self._inside = self._listener("guest.sock")
        self._calls, self.path = self._listener("vsock.sock")
        made = memory(seccomp_without_userns())
        filtered = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 64)  # out of the way of the number that the guest expects
        self.log = (place.directory / "guest.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", AS_CHANNEL, str(guest.fileno()), *machine(place, filtered, channel="listen")],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            pass_fds=[guest.fileno(), filtered], **as_user(),
        )  # fmt: skip
        guest.close()
        for fd in (made, filtered):
            os.close(fd)
        threading.Thread(target=self._serve, daemon=True).start()

    def _listener(self, name: str) -> tuple[socket.socket, str]:
        path = self.place.directory / name
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        return listener, str(path)

    def keeper(self, *options: str) -> Keeper:
        """Return a keeper of this guest, which has its `B`."""
        keeper = Keeper(self.place, "--vsock", self.path, *options, monitor=["/bin/sleep", "60"])
        keeper.send_begin()
        return keeper

    def dial(self) -> socket.socket:
        """Return a connection to the guest that is not its keeper's."""
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(10)
        link.connect(self._inside)
        return link

    def cut(self, ends: str) -> None:
        """End every connection: the `keeper`'s end, the `guest`'s, `both`, or `none`."""
        for keeper, guest in self._pairs:
            for one, name in ((keeper, "keeper"), (guest, "guest")):
                if ends in {name, "both"}:
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
        self._ended += self._pairs
        self._pairs.clear()

    def said(self) -> str:
        """Return what the guest's end printed."""
        return (self.place.directory / "guest.log").read_text()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._calls.accept()
                caller.recv(13)
                self.calls += 1
                if self.answer == "refuse":
                    caller.close()
                elif self.answer == "serve":
                    self._lead(caller)
                else:
                    self._idle.append(caller)
                    if self.answer == "nobody":
                        caller.sendall(b"OK 1\n")

    def _lead(self, caller: socket.socket) -> None:
        guest = self.dial()
        guest.settimeout(None)
        caller.sendall(b"OK %d\n" % (1 << 30))
        if self.forgets:
            self.forgets -= 1
            guest.close()
            caller.recv(1)  # what it says finds nobody
            caller.close()
            return
        self._pairs.append((caller, guest))
        for one, other in ((caller, guest), (guest, caller)):
            threading.Thread(target=_carry, args=(one, other), daemon=True).start()

    def close(self) -> None:
        """End it."""
        self.cut("both")
        for one in (*self._idle, self._calls, *(end for pair in self._ended for end in pair)):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


def _carry(source: socket.socket, target: socket.socket) -> None:
    """Carry one way; a connection that was cut at one end stays open at the other, until that is closed as well."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


def frame(kind: str, payload: bytes = b"") -> bytes:
    """Return one frame's bytes."""
    return struct.pack("<IB", len(payload), ord(kind)) + payload
