"""Sandboxes that are weak on purpose, to see that the battery finds them out. Not for anything else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from support.fake_oauth import make_certificate


class Bare:
    """No sandbox at all."""

    def __init__(self, base: Path) -> None:
        """Use a directory of the test's own."""
        self.base = str(base)
        self.runtime = str(base / "run")
        self.home = str(base)

    @property
    def environment(self) -> dict[str, str]:
        """Little, as in a sandbox, with a home of the test's own."""
        return {"PATH": os.defpath, "HOME": self.base, "LANG": "C.UTF-8"}

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return the words as they are."""
        del directory, pty
        return list(words)

    def stop_broker(self, number: signal.Signals = signal.SIGTERM) -> None:
        """There is none."""
        del number


class Plain(Bare):
    """Bubblewrap as it is often used: namespaces, the whole root read-only, no filter, home and workspace writable."""

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return bubblewrap's argv."""
        del pty
        binds = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", directory, directory]
        return [
            "/usr/bin/bwrap",
            *binds,
            "--unshare-pid",
            "--unshare-net",
            "--unshare-ipc",
            "--die-with-parent",
            *words,
        ]


class Leaky(Bare):
    """A sandbox with a network of its own, a proxy that carries everything, and agents of keys that sign everything.

    Whatever name is asked for, the proxy has a certificate for it; model traffic needs no key and every route exists.
    """

    def __init__(self, base: Path, names: tuple[str, ...], status: str) -> None:
        """Make certificates for these names; servers behind the proxy answer with a status."""
        super().__init__(base)
        self._status = status
        self._authority, self._certificate = make_certificate(base, *names)
        self.more: dict[str, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        """With the authority, the socket of an ssh-agent, and what a test adds."""
        trust = {"SSL_CERT_FILE": str(self._authority), "SSH_AUTH_SOCK": f"{self.base}/agent.sock"}
        return super().environment | trust | self.more

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return bubblewrap's argv, with the servers beside the words."""
        del pty, directory
        bubblewrap = ["/usr/bin/bwrap", "--dev-bind", "/", "/", "--unshare-net", "--die-with-parent"]
        return [
            *bubblewrap,
            "/usr/bin/python3",
            "-I",
            "-c",
            SERVERS,
            self.base,
            str(self._certificate),
            self._status,
            *words,
        ]


SERVERS = r"""
import os, socket, ssl, subprocess, sys, threading
base, certificate, status, *words = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate)
def head(sock):
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more: return b""
        data += more
    return data
def http(sock):
    if head(sock).startswith(b"CONNECT"):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        sock = context.wrap_socket(sock, server_side=True)
        head(sock)
    sock.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}".encode())
    sock.close()
def ssh(sock):
    while len(size := sock.recv(4)) == 4:
        asked = sock.recv(int.from_bytes(size, "big")) if any(size) else b""
        listed = b"\x0c" + (1).to_bytes(4, "big") + (3).to_bytes(4, "big") + b"key" + bytes(4)
        answer = listed if asked[:1] == b"\x0b" else b"\x06"
        sock.sendall(len(answer).to_bytes(4, "big") + answer)
def gpg(sock):
    with sock.makefile("rwb") as lines:
        lines.write(b"OK\n"); lines.flush()
        for _ in lines:
            lines.write(b"OK\n"); lines.flush()
def quietly(handler, sock):
    try: handler(sock)
    except OSError: pass
def serve(listener, handler):
    while True:
        sock = listener.accept()[0]
        threading.Thread(target=quietly, args=(handler, sock), daemon=True).start()
def unix(name):
    sock = socket.socket(socket.AF_UNIX)
    if os.path.exists(f"{base}/{name}"): os.unlink(f"{base}/{name}")
    sock.bind(f"{base}/{name}"); sock.listen()
    return sock
ports = {3128: http, 11435: http, 2082: http}
places = [(socket.create_server(("127.0.0.1", port)), how) for port, how in ports.items()]
for place in (*places, (unix("agent.sock"), ssh), (unix("gpg.sock"), gpg)):
    threading.Thread(target=serve, args=place, daemon=True).start()
sys.exit(subprocess.call(words))
"""
