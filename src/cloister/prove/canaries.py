"""Canaries on the host: secrets nobody inside may read, listeners nobody inside may reach, a process nobody may end.

Each is made for one battery and gone after it. `disturbed` says what happened to them since
the last look; that is how a breach is noticed which the case itself did not see. Listeners
bind loopback and abstract names only, so nothing is offered to the network.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import selectors
import socket
import subprocess
import sys
import threading
from collections import Counter
from typing import Any, Self

from cloister.prove.known_secrets import KnownSecrets

_SHARED = ("/tmp", "/dev/shm", "/var/tmp")  # noqa: S108  # the host's shared directories are the point

_ECHO = "import os\nwhile data := os.read(0, 1): os.write(1, data)"
"""What the host process does: it lives as long as its input is open."""


class Canaries:
    """Files, sockets and a process; use as a context manager."""

    def __init__(self, base: str, home: str, watched: tuple[str, ...] = (), sockets: str = "") -> None:
        """Take the directory that is ours, the home of the user, and files of the user that must not change.

        `sockets` is where a Unix socket goes, whose path must be short (unix(7)); else it is beside the files.
        """
        self._watched = watched
        self._sockets = sockets or f"{base}/outside"
        self._base = base
        self._home_file = f"{home}/.cloister-canary-{secrets.token_hex(6)}"
        self._tokens: dict[str, str] = {}
        self._shared: list[str] = []
        self._listeners = _Listeners()
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.known = KnownSecrets()
        """The agent's own secrets: nothing that comes out of the sandbox may hold one."""

    def __enter__(self) -> Self:
        os.makedirs(f"{self._base}/outside", mode=0o700)
        secret, writable = f"{self._base}/outside/secret.txt", f"{self._base}/outside/writable.txt"
        self._plant("neighbour file", secret)
        self._plant("neighbour file for writing", writable)
        self._plant("file in the home", self._home_file)
        self._shared = [
            f"{folder}/cloister-canary-{secrets.token_hex(6)}" for folder in _SHARED if os.access(folder, os.W_OK)
        ]
        for path in self._shared:
            self._plant(f"file in {os.path.dirname(path)}", path)
        self._tokens["environment of the caller"] = secrets.token_hex(16)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _ECHO, "cloister-prove-canary"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.facts |= {
            "secret": secret,
            "writable": writable,
            "home_canary": self._home_file,
            "host_pid": self._process.pid,
        }
        self.facts["shared_canaries"] = self._shared
        self.facts |= self._listeners.start(f"{self._sockets}/host.sock")
        self._before = self._look()
        return self

    def __exit__(self, *_: object) -> None:
        self._listeners.stop()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        for path in (self._home_file, *self._shared):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @property
    def environment(self) -> dict[str, str]:
        """A secret in the caller's environment, under a name no policy carries in."""
        return {"CLOISTER_PROVE_CANARY": f"canary-{self._tokens['environment of the caller']}"}

    def found_in(self, text: str) -> list[str]:
        """Return which canaries stand in something that came out of the sandbox."""
        planted = [f"canary read: {name}" for name, token in self._tokens.items() if token in text]
        return planted + self.known.found_in(text.encode("utf-8", "surrogateescape"))

    def disturbed(self) -> list[str]:
        """Return what happened to the canaries since the last call."""
        now = self._look()
        changes = [
            f"{name}: {value} instead of {self._before[name]}"
            for name, value in now.items()
            if value != self._before[name]
        ]
        self._before = now
        return changes

    def _plant(self, name: str, path: str) -> None:
        self._tokens[name] = secrets.token_hex(16)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, f"canary-{self._tokens[name]}\n".encode())
        os.close(descriptor)

    def _answers(self) -> bool:
        """Ask the host process for an echo: a kill takes a moment to show, an answer does not lie."""
        assert self._process is not None  # noqa: S101  # started by `__enter__`
        if self._process.stdin is None or self._process.stdout is None:
            return False
        try:
            self._process.stdin.write(b"x")
        except OSError:
            return False
        ready = select.select([self._process.stdout], [], [], 2.0)[0]
        return bool(ready and self._process.stdout.read(1))

    def _look(self) -> dict[str, Any]:
        """Return everything about the canaries that an attack could change."""
        paths = (self.facts["secret"], self.facts["writable"], self._home_file, *self._shared, *self._watched)
        look: dict[str, Any] = {f"file {os.path.basename(path)}": _stat(path) for path in paths}
        look["files beside the workspace"] = sorted(os.listdir(f"{self._base}/outside"))
        look["host process"] = "alive" if self._answers() else "dead or stopped"
        for name, count in self._listeners.counts().items():
            look[f"connections to {name}"] = count
        return look


def _stat(path: str) -> str:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return "gone"
    return f"mode {info.st_mode:o}, {info.st_nlink} links, {info.st_size} bytes, changed {info.st_ctime_ns}"


class _Listeners:
    """Sockets of the host that count who comes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._counts: Counter[str] = Counter()
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self, path: str) -> dict[str, Any]:
        """Listen everywhere; return where."""
        abstract = f"cloister-prove-{secrets.token_hex(8)}"
        tcp = self._add("TCP on 127.0.0.1", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = self._add("UDP on 127.0.0.1", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self._add("a Unix socket", socket.AF_UNIX, socket.SOCK_STREAM, path)
        self._add("an abstract socket", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}")
        facts = {
            "tcp_port": tcp.getsockname()[1],
            "udp_port": udp.getsockname()[1],
            "unix_socket": path,
            "abstract_socket": abstract,
        }
        with contextlib.suppress(OSError):  # a host without IPv6
            facts["tcp6_port"] = self._add("TCP on ::1", socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)).getsockname()[
                1
            ]
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._thread.start()
        return facts

    def counts(self) -> dict[str, int]:
        """Return how many came to each."""
        return dict(self._counts)

    def stop(self) -> None:
        """Close everything."""
        os.write(self._woken, b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        os.close(self._wake)
        os.close(self._woken)

    def _add(self, name: str, family: int, kind: int, address: Any) -> socket.socket:
        sock = socket.socket(family, kind)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(16)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, name)
        self._counts[name] = 0
        return sock

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if not isinstance(key.fileobj, socket.socket):
                    return
                self._counts[key.data] += 1
                with contextlib.suppress(OSError):
                    if key.fileobj.type == socket.SOCK_DGRAM:
                        key.fileobj.recv(65536)
                    else:
                        key.fileobj.accept()[0].close()
