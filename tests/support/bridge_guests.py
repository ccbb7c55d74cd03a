"""Guests on the bridge of microVMs without virtual machines: a user's process that asks for taps and speaks on them.

`python -m support.bridge_guests` runs inside a test machine as an ordinary user; each line of its standard input is a
command as JSON, each line of its output the answer. A guest can be spoken for frame by frame, or be *plugged in*: then
its tap is carried to an interface of that name in a network namespace of its own, where real programs use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

from cloister.errors import CloisterError
from cloister.host import tap_client
from cloister.host.rtnetlink import Rtnetlink

_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _SIOCSIFHWADDR = 0x400454CA, 0x400454CB, 0x400454CC, 0x8924
_FLAGS = 0x0002 | 0x1000
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_PATIENCE_S = 1.0


class Guest:
    """One place on the bridge."""

    def __init__(self, given: tap_client.Given) -> None:
        self.given = given
        self.pid = 0
        self.inside: socket.socket | None = None
        self.peers: list[str] = []
        self.answer = b""

    def serve(self, answer: str) -> None:
        """Answer everybody who connects to the listener, and remember who it was."""
        listener, self.answer = self.given.listener, answer.encode()

        def accept() -> None:
            listener.setblocking(True)
            while True:
                try:
                    sock, (peer, _) = listener.accept()
                except OSError:
                    return
                self.peers.append(peer)
                with sock:
                    sock.sendall(self.answer)

        threading.Thread(target=accept, daemon=True).start()

    def plug_in(self) -> None:
        """Carry the tap into a network namespace of its own."""
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            with contextlib.suppress(BaseException):
                _live_inside(self.given, theirs)
            os._exit(1)
        theirs.close()
        self.inside = ours
        assert ours.recv(1) == b"!"

    def close(self) -> None:
        """Give the place up."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        tap_client.give_up(self.given)


def _live_inside(given: tap_client.Given, orders: socket.socket) -> None:
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWUSER | _NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _FLAGS))
    with Rtnetlink() as kernel:
        link = kernel.link("eth0")
        assert link
        kernel.set_mac(link.number, given.tap.mac)
        kernel.add_address(link.number, f"{given.tap.address}/24")
        for each in kernel.links():
            kernel.set_up(each.number)
    subprocess.run(["ip", "route", "add", "default", "via", given.tap.gateway], check=True)
    threading.Thread(target=_carry, args=(device, given.device), daemon=True).start()
    orders.sendall(b"!")
    while order := orders.recv(1 << 16):
        targets = json.loads(order)
        orders.sendall(json.dumps(_connect_all(targets)).encode())


def _carry(one: int, other: int) -> None:
    while True:
        for ready in select.select([one, other], [], [])[0]:
            with contextlib.suppress(BlockingIOError, OSError):
                os.write(other if ready == one else one, os.read(ready, 1 << 17))


def _connect_all(targets: list[list[Any]]) -> list[str]:
    """Connect to all of them at once; return what each said, or the name of the error, or `silence`."""
    made = []
    for kind, address, port in targets:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError, OSError):
            sock.connect((address, port))
            if kind == "udp":
                sock.send(b"?")
        made.append(sock)
    said = ["silence"] * len(made)
    until = time.monotonic() + _PATIENCE_S
    left = dict(enumerate(made))
    while left and time.monotonic() < until:
        for sock in select.select(list(left.values()), [], [], 0.1)[0]:
            number = next(number for number, one in left.items() if one is sock)
            try:
                said[number] = sock.recv(1 << 16).decode()
            except OSError as error:
                said[number] = os.strerror(error.errno or 0)
            del left[number]
    for sock in made:
        sock.close()
    return said


class Program:
    """What the commands are."""

    def __init__(self) -> None:
        self.guests: dict[str, Guest] = {}

    def do(self, order: dict[str, Any]) -> Any:
        """Carry out one command."""
        return getattr(self, f"do_{order.pop('do')}")(**order)

    def do_ask(self, name: str) -> Any:
        """Ask hostd for a tap; return it, or the refusal."""
        try:
            self.guests[name] = Guest(tap_client.ask(f"run-{os.getpid()}-{name}"))
        except CloisterError as error:
            return {"error": error.reference, "text": str(error), "remedy": error.remedy}
        tap = self.guests[name].given.tap
        return {field: getattr(tap, field) for field in tap.__struct_fields__}

    def do_serve(self, name: str, answer: str) -> None:
        """Answer the guest of this name."""
        self.guests[name].serve(answer)

    def do_peers(self, name: str) -> list[str]:
        """Return who connected."""
        return self.guests[name].peers

    def do_plug(self, name: str) -> None:
        """Carry the tap to real programs."""
        self.guests[name].plug_in()

    def do_connect(self, name: str, targets: list[list[Any]]) -> Any:
        """Connect as the guest's programs."""
        inside = self.guests[name].inside
        assert inside
        inside.sendall(json.dumps(targets).encode())
        return json.loads(inside.recv(1 << 16))

    def do_here(self, targets: list[list[Any]]) -> Any:
        """Connect as a program of the host."""
        return _connect_all(targets)

    def do_bind(self, address: str, port: int) -> str:
        """Listen as a program of the host."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
            sock.listen()
        except OSError as error:
            return os.strerror(error.errno or 0)
        threading.Thread(target=lambda: sock.accept()[0].sendall(b"IMPOSTOR"), daemon=True).start()
        return "bound"

    def do_send(self, name: str, frames: list[str]) -> list[str]:
        """Write frames to the tap."""
        said = []
        for frame in frames:
            try:
                os.write(self.guests[name].given.device, bytes.fromhex(frame))
                said.append("sent")
            except OSError as error:
                said.append(os.strerror(error.errno or 0))
        return said

    def do_heard(self, name: str, seconds: float = 0.3) -> list[str]:
        """Return the frames that the tap gives in this time."""
        device, until = self.guests[name].given.device, time.monotonic() + seconds
        found = []
        while (left := until - time.monotonic()) > 0:
            if select.select([device], [], [], left)[0]:
                try:
                    found.append(os.read(device, 1 << 17).hex())
                except OSError as error:
                    return [*found, os.strerror(error.errno or 0)]
        return found

    def do_tamper(self, name: str, how: str, mac: str = "") -> str:
        """Do to the tap what its descriptor allows."""
        device = self.guests[name].given.device
        try:
            if how == "persist":
                fcntl.ioctl(device, _TUNSETPERSIST, 1)
            elif how == "mac":
                request = struct.pack("16sH6s16x", name.encode(), 1, bytes.fromhex(mac.replace(":", "")))
                fcntl.ioctl(device, _SIOCSIFHWADDR, request)
        except OSError as error:
            return os.strerror(error.errno or 0)
        return "done"

    def do_drop_listener(self, name: str) -> None:
        """Close the listener, and keep the tap."""
        listener = self.guests[name].given.listener
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()

    def do_close(self, name: str) -> None:
        """Give a place up."""
        self.guests.pop(name).close()


def main() -> None:
    """Obey until there are no more commands."""
    program = Program()
    for line in sys.stdin:
        try:
            answer = {"said": program.do(json.loads(line))}
        except Exception as error:  # noqa: BLE001  # the test shall see it
            answer = {"broke": repr(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
