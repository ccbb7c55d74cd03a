"""Firecracker's way to a guest's vsock, over a virtio-serial port.

One connects to a Unix socket, writes `CONNECT PORT`, reads `OK NUMBER`, and has a stream; where nobody listens in the
guest the connection is closed (their docs/vsock.md). Here only port 5000 leads anywhere, and only one stream at a time,
since a port of virtio-serial is one.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable
from pathlib import Path

PORT = b"5000"
_LINE = 32
_PIECE = 65536


class Bridge:
    """The Unix socket of a guest's vsock."""

    def __init__(self, path: str) -> None:
        """Listen; connections are closed until a guest is there.

        Raises:
            OSError: something is at the path already.
        """
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(path)
        self._server.listen(16)
        self._numbers = itertools.count(1 << 30)
        self._busy = threading.Lock()
        self._guest: tuple[Path, Callable[[], bool]] | None = None
        self._joined: tuple[socket.socket, socket.socket] | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def lead_to(self, channel: Path, is_open: Callable[[], bool]) -> None:
        """Say where the guest is, and how to know whether it listens."""
        self._guest = (channel, is_open)

    def reset(self) -> None:
        """Have the guest forget its connection, as Firecracker does when it writes a machine down."""
        for end in self._joined or ():
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            line = b""
            while not line.endswith(b"\n") and len(line) < _LINE:
                byte = client.recv(1)
                if not byte:
                    return
                line += byte
            if line != b"CONNECT " + PORT + b"\n" or self._guest is None or not self._guest[1]():
                return
            if not self._busy.acquire(blocking=False):
                return
            try:
                self._join(client, self._guest[0])
            finally:
                self._busy.release()

    def _join(self, client: socket.socket, channel: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
            guest.connect(str(channel))
            self._joined = (client, guest)
            client.sendall(b"OK %d\n" % next(self._numbers))
            back = threading.Thread(target=_pump, args=(guest, client), daemon=True)
            back.start()
            _pump(client, guest)
            # A port of virtio-serial has no half of a connection: when the host is gone, the guest hears it.
            with contextlib.suppress(OSError):
                guest.shutdown(socket.SHUT_RDWR)
            back.join()
            self._joined = None


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
