"""Waiting for the redirect that ends an authorization: a listener on loopback, and lines typed meanwhile.

It knows HTTP just well enough for a browser on this machine (RFC 8252 section 7.3): GET of one path, with
a Host field that names this listener, so that no page reaches it under a name of its own (DNS
rebinding). Whether a redirect is the right one is for the caller. Nothing is logged; the pages it
answers with hold nothing of the request.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from cloister.errors import RetryError

_MAX_HEAD = 16 * 1024
_MAX_OPEN = 16
_HEAD_S = 10.0
_TICK_S = 0.5
_LINE = 4096
_REASONS = {200: "OK", 302: "Found", 400: "Bad Request", 404: "Not Found"}


class Redirected:
    """A browser came with a query; it waits for `answer`."""

    def __init__(self, query: str, sock: socket.socket) -> None:
        """Keep the browser waiting."""
        self.query = query
        self._sock = sock

    def answer(self, status: int, text: str) -> None:
        """Show a sentence in the browser, and let it go."""
        _reply(self._sock, status, text)


@dataclass(frozen=True, slots=True)
class Typed:
    """The person typed or pasted a line."""

    line: str = field(repr=False)


class Redirects:
    """The listener. Use as a context manager."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        """Listen at the first of some addresses that is free; `{port}` stands for any free port.

        Raises:
            RetryError: all are taken (`login-port-taken`).
        """
        self._listener, self.redirect_uri = _listen(addresses)
        parts = urlsplit(self.redirect_uri)
        self._path = parts.path
        self._hosts = {f"{name}:{parts.port}" for name in ("127.0.0.1", "localhost")}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._open: dict[socket.socket, tuple[bytes, float]] = {}
        self._start: tuple[str, str] = ("", "")

    def __enter__(self) -> Self:
        """Listen already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything."""
        for sock in list(self._open):
            self._drop(sock)
        self._selector.close()
        self._listener.close()

    def start_at(self, nonce: str, target: str) -> str:
        """Return an address here that leads to `target`, once.

        A browser gets it as an argument, which other users of the machine can read; `target` they cannot.
        """
        self._start = (f"/start/{nonce}", target)
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/start/{nonce}"

    def events(self, timeout_s: float, terminal: int = -1) -> Iterator[Redirected | Typed]:
        """Yield redirects and lines until nobody asks for more, or the time is over.

        Args:
            timeout_s: seconds to wait in all.
            terminal: a descriptor to read lines from, or -1.
        """
        if terminal >= 0:
            self._selector.register(terminal, selectors.EVENT_READ)
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, _TICK_S)):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    yield from self._receive(key.fileobj)
                else:
                    yield from self._line(terminal)
            for sock in [sock for sock, (_, until) in self._open.items() if time.monotonic() > until]:
                self._drop(sock)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            if len(self._open) >= _MAX_OPEN:
                sock.close()
                return
            sock.setblocking(False)
            self._open[sock] = (b"", time.monotonic() + _HEAD_S)
            self._selector.register(sock, selectors.EVENT_READ)

    def _receive(self, sock: socket.socket) -> Iterator[Redirected]:
        head, until = self._open[sock]
        try:
            data = sock.recv(_MAX_HEAD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        head += data
        if not data or len(head) > _MAX_HEAD:
            self._drop(sock)
        elif b"\r\n\r\n" not in head:
            self._open[sock] = (head, until)
        else:
            del self._open[sock]
            self._selector.unregister(sock)
            yield from self._request(head.partition(b"\r\n\r\n")[0], sock)

    def _request(self, head: bytes, sock: socket.socket) -> Iterator[Redirected]:
        first, *fields = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        hosts = [line.partition(":")[2].strip().lower() for line in fields if line.lower().startswith("host:")]
        usable = len(words) == 3 and words[0] == "GET" and words[1].startswith("/") and len(hosts) == 1  # noqa: PLR2004
        path, _, query = words[1].partition("?") if usable else ("", "", "")
        if not usable or hosts[0] not in self._hosts:
            _reply(sock, 400, "This is no request for Cloister.")
        elif self._start[0] and path == self._start[0]:
            target, self._start = self._start[1], ("", "")
            _reply(sock, 302, "Go on in your browser.", target)
        elif path == self._path:
            yield Redirected(query, sock)
        else:
            _reply(sock, 404, "There is nothing here.")

    def _line(self, terminal: int) -> Iterator[Typed]:
        try:
            data = os.read(terminal, _LINE)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(terminal)
        elif data.strip():
            yield Typed(data.decode("utf-8", "replace"))

    def _drop(self, sock: socket.socket) -> None:
        self._open.pop(sock, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        sock.close()


def _listen(addresses: tuple[str, ...]) -> tuple[socket.socket, str]:
    for address in addresses:
        wanted = 0 if "{port}" in address else urlsplit(address).port or 0
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if wanted:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", wanted))
            listener.listen(_MAX_OPEN)
        except OSError:
            listener.close()
            continue
        listener.setblocking(False)
        return listener, address.replace("{port}", str(listener.getsockname()[1]))
    raise RetryError(
        "login-port-taken", "every port that the provider redirects to is taken", where=", ".join(addresses),
        remedy="end the other login, or add --paste where the provider has it",
    )  # fmt: skip


def _reply(sock: socket.socket, status: int, text: str, location: str = "") -> None:
    body = f"<!doctype html><meta charset=utf-8><title>Cloister</title><p>{text}</p>".encode()
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "Content-Type: text/html; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Content-Security-Policy: default-src 'none'",
        "Referrer-Policy: no-referrer",
        "Cache-Control: no-store",
        "Connection: close",
        *([f"Location: {location}"] if location else []),
    ]
    with contextlib.suppress(OSError), sock:
        sock.setblocking(True)
        sock.settimeout(2.0)
        sock.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        sock.shutdown(socket.SHUT_WR)
