"""A guest that is the test itself: it speaks over the socket that a monitor with vsock would make.

Not the shim's code: what it sends is written from ARCHITECTURE.md, byte for byte, so that it can be wrong on purpose.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Sequence

from keeper_rig import Keeper, Place

from cloister.host import frames
from cloister.host.vm_link import PROTOCOL

WINDOW = 256 * 1024
DATA_MAX = 64 * 1024
FIRST_COMMAND = 0x8000_0000


def u32(*values: int) -> bytes:
    """Return numbers, little endian."""
    return struct.pack(f"<{len(values)}I", *values)


def stream_of(command: int, k: int) -> int:
    """Return the number of a command's stream."""
    return FIRST_COMMAND | command << 2 | k


class FakeGuest:
    """One end of the link, by hand."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(10)
        self.nonce = b""

    def raw(self, data: bytes) -> None:
        """Send bytes; a keeper that has had enough may be gone."""
        with contextlib.suppress(OSError):
            self.connection.sendall(data)

    def send(self, kind: str, payload: bytes = b"") -> None:
        """Send one frame."""
        self.raw(struct.pack("<IB", len(payload), ord(kind)) + payload)

    def receive(self) -> tuple[str, bytes]:
        """Return the next frame; empty at the end."""
        head = self._exactly(5)
        if len(head) < 5:
            return "", b""
        length, kind = struct.unpack("<IB", head)
        return chr(kind), self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                part = self.connection.recv(length - len(data))
            except ConnectionError:
                part = b""
            if not part:
                break
            data += part
        return data

    def until(self, kind: str) -> bytes:
        """Return the payload of the next frame of this type."""
        while True:
            found, payload = self.receive()
            assert found, f"no {kind}"
            if found == kind:
                return payload

    def joined(self, words: Sequence[bytes] = (b"kernel=6.1",)) -> None:
        """Say hello."""
        join = self.until("J")
        assert join[:4] == u32(PROTOCOL)
        self.nonce = join[4:]
        self.send("H", u32(PROTOCOL) + self.nonce + frames.encode_list(words))

    def begun(self) -> None:
        """Say hello, take the tar, and report walls that stand."""
        self.joined()
        self.until("B")
        self.until("F")
        self.send("P", frames.encode_list([b"verdict=passed"]))


class Fake:
    """A keeper and the fake guest behind it."""

    def __init__(self, place: Place, *options: str, jail: bool = True) -> None:
        path = place.directory / "vsock.sock"
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        path.chmod(0o777)
        self.listener.listen()
        self.listener.settimeout(10)
        self.keeper = Keeper(place, "--vsock", str(path), *options, monitor=["/bin/sleep", "60"], jail=jail)
        self.keeper.send_begin()
        self.guest = FakeGuest(self.knocked())
        self.guest.connection.sendall(b"OK 1073741824\n")

    def knocked(self) -> socket.socket:
        """Return the keeper's next connection to the monitor; it waits for an answer."""
        connection, _ = self.listener.accept()
        connection.settimeout(10)
        assert connection.recv(13) == b"CONNECT 5000\n"
        return connection

    def met(self) -> None:
        """Take the keeper's next connection for the guest's, in place of the last one."""
        connection = self.knocked()
        connection.sendall(b"OK 1073741825\n")
        self.guest.connection.close()
        self.guest.connection = connection

    def met_again(self) -> None:
        """Be the guest that was kept, on the keeper's new connection."""
        self.met()
        assert self.guest.receive() == ("I", self.guest.nonce)
        self.guest.send("I", self.guest.nonce)

    def running(self, stdio: Sequence[int]) -> None:
        """Bring it to a running agent."""
        self.guest.begun()
        self.keeper.until("P")
        self.keeper.go("/bin/agent", stdio=stdio)
        self.guest.until("G")
        self.guest.send("R", u32(0, 42))
        self.keeper.until("R")

    def refused(self, what: str = "") -> dict[str, str]:
        """Return why the keeper ended the machine; it must have, and be gone."""
        died = self.keeper.died()
        assert died["reason"] == "guest-protocol"
        assert what in died["text"], died
        assert self.keeper.over(5) in {125, 137}
        return died

    def fine(self) -> None:
        """The run lives, and answers."""
        self.keeper.channel.send("T")
        self.guest.until("T")
        self.guest.send("T", frames.encode_list([b"alive=1"]))
        assert b"alive=1" in self.keeper.until("T")

    def close(self) -> None:
        """End both."""
        self.guest.connection.close()
        self.listener.close()
        self.keeper.close()


def fake_of_test(place: Place) -> Iterator[Fake]:
    """Body of a fixture."""
    fake = Fake(place)
    try:
        yield fake
    finally:
        fake.close()


def resident(keeper: Keeper) -> int:
    """Return the keeper's memory in bytes."""
    with open(f"/proc/{keeper.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def wait_for(condition: object, timeout_s: float = 5) -> bool:
    """Whether a condition comes true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False
