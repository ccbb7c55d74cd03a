"""One POST to a provider's endpoint: TLS verified, no redirects, every bound set. Blocks; meant for a thread.

Small on purpose: `http.client` parses, and a timer ends what takes too long as a whole, because socket
timeouts begin anew with every byte. Nothing of the request or the answer is in any error. `ssl` is
imported with the first call: a run without logins never pays for it.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

MAX_ANSWER_BYTES = 256 * 1024
DEADLINE_S = 30.0
_CONNECT_S = 10.0
_AGENT = "cloister"


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    retry_after_s: float


class UnreachableError(Exception):
    """There was no whole answer. `reason` is a short word; `sent` says whether the provider may have the request."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        """Keep both; what the library said is not kept, for it may quote."""
        super().__init__(reason)
        self.reason = reason
        self.sent = sent


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy to go through by CONNECT."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)


def post(
    url: str, content_type: str, body: bytes, *, proxy: Proxy | None = None, deadline_s: float = DEADLINE_S
) -> Answer:
    """Send a request and return the answer.

    Args:
        url: https, or http to a loopback address; the caller has checked it (`policy.login_check.is_endpoint`).
        content_type: of the body.
        body: with a token or a code in it.
        proxy: where to go through.
        deadline_s: seconds for all of it, but for the resolver's own time.

    Raises:
        UnreachableError: no connection, no verified TLS, no whole answer within bounds and time.
    """
    connection = _connection(url, proxy)
    stage = _Stage()
    timer = threading.Timer(deadline_s, lambda: stage.end(connection))
    timer.daemon = True
    timer.start()
    try:
        return _converse(connection, url, content_type, body, stage)
    except TimeoutError:
        raise UnreachableError("timeout", sent=stage.sent) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "timeout" if stage.over else _reason(error)
        raise UnreachableError(reason, sent=stage.sent) from None
    finally:
        timer.cancel()
        connection.close()


class _Stage:
    """How far a request is, and whether its time is over."""

    def __init__(self) -> None:
        self.sent = False
        self.over = False

    def end(self, connection: http.client.HTTPConnection) -> None:
        """Break the connection from the timer's thread: whoever reads from it sees its end."""
        self.over = True
        sock = connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the TCP one: TLS would want to say goodbye


class _Verified(http.client.HTTPConnection):
    """HTTP over TLS, with the handshake under the eyes of the timer: `http.client`'s own hides the socket meanwhile."""

    default_port = 443

    def connect(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        import ssl

        super().connect()
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        name = getattr(self, "_tunnel_host", None) or self.host
        sock = context.wrap_socket(self.sock, server_hostname=name, do_handshake_on_connect=False)
        self.sock = sock
        sock.do_handshake()


def _connection(url: str, proxy: Proxy | None) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, port or 80, timeout=_CONNECT_S)
    if proxy is None:
        return _Verified(host, port or 443, timeout=_CONNECT_S)
    connection = _Verified(proxy.host, proxy.port, timeout=_CONNECT_S)
    headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
    connection.set_tunnel(host, port or 443, headers)
    return connection


def _converse(
    connection: http.client.HTTPConnection, url: str, content_type: str, body: bytes, stage: _Stage
) -> Answer:
    parts = urlsplit(url)
    connection.connect()
    if stage.over:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(DEADLINE_S)
    stage.sent = True
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Content-Type": content_type, "Accept": "application/json", "User-Agent": _AGENT, "Connection": "close"}
    connection.request("POST", target, body, headers)
    response = connection.getresponse()
    data = response.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise UnreachableError("answer-too-big", sent=True)
    length = response.getheader("Content-Length", "")
    if length.isdigit() and int(length) != len(data):
        raise http.client.IncompleteRead(b"")
    if stage.over:  # a head that was broken off looks like one without a body
        raise TimeoutError
    after = response.getheader("Retry-After", "")
    return Answer(response.status, data, float(after) if after.isdigit() and len(after) < 6 else 0.0)  # noqa: PLR2004


def _reason(error: Exception) -> str:
    """Name what went wrong in a word; libraries' own texts may quote an answer."""
    names: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: isinstance(error, socket.gaierror), "name-not-found"),
        (lambda: type(error).__name__ == "SSLCertVerificationError", "certificate-not-trusted"),
        (lambda: type(error).__name__.startswith("SSL"), "tls-failed"),
        (lambda: isinstance(error, ConnectionRefusedError), "connection-refused"),
        (lambda: isinstance(error, ConnectionError), "connection-lost"),
        (lambda: isinstance(error, http.client.IncompleteRead), "answer-cut-off"),
        (lambda: isinstance(error, http.client.HTTPException | ValueError), "answer-not-http"),
    )
    return next((name for fits, name in names if fits()), "network-down")
