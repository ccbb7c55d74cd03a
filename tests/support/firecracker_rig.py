"""A Firecracker (or what stands in for it) that a test has started, with its socket and a client of our own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

FIRST_FILE = 5
_FREE = 100
APPEARS_S = 30.0


class Rig:
    """One process, outside any jail."""

    def __init__(self, program: Path, directory: Path, *, version: str = "", files: Sequence[tuple[Path, bool]] = ()):
        """Start it; `files` (path, whether it is written) become descriptors from 5 on, as in the jail of a run."""
        self.directory = directory
        self.socket = directory / "api.sock"
        self.channel = directory / "vsock.sock"
        self.console = directory / "console"
        environment = {**os.environ, "FIRECRACKER_ALIKE_VERSION": version} if version else None
        argv = [str(program), "--id", "test", "--api-sock", str(self.socket)]
        with self.console.open("ab") as console, _handed(files) as numbers:

            def number() -> None:
                for place, descriptor in enumerate(numbers):
                    os.dup2(descriptor, FIRST_FILE + place)

            self.process = subprocess.Popen(
                argv,
                close_fds=False,
                stdin=subprocess.DEVNULL,
                stdout=console,
                env=environment,
                preexec_fn=number,  # noqa: PLW1509
            )

    def wait_until_it_listens(self) -> None:
        """Return when the API answers connections."""
        until = time.monotonic() + APPEARS_S
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
                return
            assert self.process.poll() is None, "it has ended"
            assert time.monotonic() < until, "it does not listen"
            time.sleep(0.01)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        """Return the status and the fault of a call, asked without any code of the product."""
        text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(APPEARS_S)
            link.connect(str(self.socket))
            head = f"{method} {path} HTTP/1.1\r\nContent-Length: {len(text.encode())}\r\n\r\n"
            link.sendall(head.encode() + text.encode())
            # 204 has no body (RFC 9110); the others say how long theirs is.
            data = b""
            while b"\r\n\r\n" not in data:
                data += link.recv(4096)
            first, _, rest = data.partition(b"\r\n\r\n")
            length = next((int(line[15:]) for line in first.lower().split(b"\r\n") if b"content-length:" in line), 0)
            while len(rest) < length:
                rest += link.recv(4096)
        status = int(first.split(b" ")[1])
        return status, json.loads(rest).get("fault_message", "") if rest else ""

    def connect(self, port: int = 5000, *, within_s: float = 60.0) -> socket.socket:
        """Return a stream to the guest, as soon as it listens."""
        until = time.monotonic() + within_s
        while time.monotonic() < until and self.process.poll() is None:
            link = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                link.settimeout(within_s)
                link.connect(str(self.channel))
                link.sendall(b"CONNECT %d\n" % port)
                if link.recv(64, socket.MSG_PEEK).startswith(b"OK "):
                    while link.recv(1) != b"\n":
                        pass
                    return link
            link.close()
            time.sleep(0.05)
        raise AssertionError(f"the guest does not listen: {self.console.read_text(errors='replace')[-500:]}")

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for path in (self.socket, self.channel):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _handed(files: Sequence[tuple[Path, bool]]) -> Iterator[list[int]]:
    """Open files at numbers that are in nobody's way."""
    numbers: list[int] = []
    try:
        for path, write in files:
            descriptor = os.open(path, os.O_RDWR if write else os.O_RDONLY)
            numbers.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FREE))
            os.close(descriptor)
        yield numbers
    finally:
        for number in numbers:
            os.close(number)
