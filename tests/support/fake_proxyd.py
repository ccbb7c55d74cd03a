"""A stand-in for the system's broker: it answers hostd with a plan it was given, and keeps what it gets.

`python -m support.fake_proxyd PLAN LOG` runs inside a test machine, and becomes the broker's account. It makes the
run's box, answers each request with the plan (RUN, ROOT and DIRECTORY replaced), then drives the shim: it sends go
when the probe has passed, and writes every event as a line of JSON to the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloister.host.frames import Channel, Frame, FrameError, decode_list, encode_list, encode_u32

SOCKET = "/run/cloister/proxyd.sock"
RUNS = "/run/cloister/proxy/runs"


class Talk:
    """A channel that waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        sock.setblocking(True)

    def receive(self) -> Frame:
        """Return the next frame, whenever it comes."""
        frame = None
        while frame is None:
            frame = self._channel.receive()
        return frame

    def send(self, kind: str, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Send a frame."""
        self._channel.send(kind, payload, descriptors)

    def close(self) -> None:
        """Close it."""
        self._channel.close()


class Broker:
    """Serves one request after the other, each in a thread."""

    def __init__(self, answers: Path, log: Path) -> None:
        self.answers = answers
        self.log = log
        self.lock = threading.Lock()

    def say(self, **event: Any) -> None:
        """Write an event."""
        with self.lock, self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def serve(self) -> None:
        """Listen until killed."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(SOCKET)
        account = pwd.getpwnam("cloister-proxy")
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        listener.listen()  # from here on SO_PEERCRED says that account (unix(7))
        self.say(listening=True)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self.one, args=(sock,), daemon=True).start()

    def one(self, sock: socket.socket) -> None:
        """Serve one request; whatever happens is an event."""
        try:
            self.request(Talk(sock))
        except FrameError as error:
            self.say(broken=str(error))
        finally:
            sock.close()

    def request(self, talk: Talk) -> None:
        """Answer with the plan, then wait for the unit and run its command."""
        first = talk.receive()
        fields = dict(item.decode().split("=", 1) for item in decode_list(first.payload)[0])
        try:
            rest = {frame.kind: frame.payload for frame in (talk.receive() for _ in range(3))}
        except FrameError:  # hostd was killed: its caller hears of it only when nobody has the connection any more
            for descriptor in first.descriptors:
                os.close(descriptor)
            raise
        self.say(fields=fields, part=rest["U"].decode(), words=[word.decode() for word in decode_list(rest["V"])[0]])
        answers = json.loads(self.answers.read_text())
        if refusal := answers.get("refuse"):
            talk.send("F", bytes([refusal[0]]) + refusal[1].encode())
            for descriptor in first.descriptors:
                os.close(descriptor)
            return
        run = fields["run"]
        self.box(run)
        text = json.dumps(answers["plan"])
        for name, value in {"RUN": run, "ROOT": fields["root"], "DIRECTORY": fields["directory"]}.items():
            text = text.replace(f"@{name}@", value.replace("\\", "\\\\").replace('"', '\\"'))
        talk.send("P", text.encode())
        try:
            stood = talk.receive()
        except FrameError:
            for descriptor in first.descriptors:
                os.close(descriptor)
            raise
        if stood.kind == "F":
            self.say(refused=stood.payload[1:].decode(), code=stood.payload[0])
            lease = Talk(socket.socket(fileno=first.descriptors[1]))
            lease.send("F", stood.payload)
            lease.close()
            for descriptor in (first.descriptors[0], *first.descriptors[2:]):
                os.close(descriptor)
            return
        self.say(stood=json.loads(stood.payload))
        words = [word.encode() for word in answers["plan"]["steps"][-1]["command"]]
        order = encode_u32(0) + encode_list(words)
        order += encode_list([b"PATH=/usr/bin:/bin", b"LANG=C.UTF-8", f"HOME=/home/{fields['account']}".encode()])
        order += encode_list([fields["directory"].encode()])
        self.drive(run, stood.descriptors, first.descriptors, order)

    def box(self, run: str) -> None:
        """Make the run's box, with the socket of the relay in it."""
        box = Path(RUNS, run, "box")
        box.mkdir(parents=True, mode=0o755)
        box.chmod(0o755)
        box.joinpath("note").write_text("of the broker\n")
        relay = socket.socket(socket.AF_UNIX)
        relay.bind(str(box / "egress.sock"))
        box.joinpath("egress.sock").chmod(0o666)
        relay.listen()
        threading.Thread(target=answer_probes, args=(relay,), daemon=True).start()

    def drive(self, run: str, unit: tuple[int, ...], caller: tuple[int, ...], order: bytes) -> None:
        """Send go after the probe, tell the caller how it ended, and have hostd undo the rest."""
        shim, lease = Talk(socket.socket(fileno=unit[0])), Talk(socket.socket(fileno=caller[1]))
        code = 125
        with contextlib.suppress(FrameError):
            for frame in frames(shim):
                self.say(shim=frame.kind + frame.payload.decode("latin-1"))
                if frame.kind == "P" and b"verdict=passed" in frame.payload:
                    shim.send("G", order, caller[2:5])
                if frame.kind == "E":
                    code = frame.payload[4]
        for descriptor in (caller[0], *caller[2:5]):
            os.close(descriptor)
        try:
            self.say(ended=self.end(run))
        except OSError as error:  # hostd was killed: its next start undoes the rest
            self.say(broken=str(error))
        with contextlib.suppress(FrameError):
            lease.send("J", json.dumps({"receipt": {"exit": code}}).encode())
        lease.close()

    @staticmethod
    def end(run: str) -> Any:
        """Ask hostd to stop the unit and to undo its part."""
        return ask_hostd("end", run=run)


def ask_hostd(verb: str, **fields: str) -> Any:
    """Send hostd a request as the system's broker does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("/run/cloister/hostd.sock")
        talk = Talk(sock)
        talk.send("L", encode_list(f"{name}={value}".encode() for name, value in {"verb": verb, **fields}.items()))
        answer = talk.receive()
        return json.loads(answer.payload) if answer.kind == "J" else answer.payload[1:].decode()


def frames(talk: Talk) -> Iterator[Frame]:
    """Yield frames until the other side has closed."""
    with contextlib.suppress(FrameError):
        while True:
            yield talk.receive()


def answer_probes(relay: socket.socket) -> None:
    """Take connections and close them: enough for the shim's probe of its way out."""
    while True:
        sock, _ = relay.accept()
        with contextlib.suppress(OSError), sock:
            sock.settimeout(5)
            if sock.recv(4096):
                sock.sendall(b"\5\0")  # RFC 1928, section 3: no authentication


def peer(sock: socket.socket) -> int:
    """Return the uid of who connected."""
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


if __name__ == "__main__":
    Broker(Path(sys.argv[1]), Path(sys.argv[2])).serve()
