"""The one POST to a provider: TLS is verified, bounds hold, nothing is quoted."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister.credentials.oauth import Request
from cloister.host.token_endpoint import Proxy, UnreachableError, post
from cloister.runs.login_renewal import poster
from support.fake_oauth import make_certificate

pytestmark = pytest.mark.kernel
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def server(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve connections with a function; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    try:
                        talk(sock)
                    except (OSError, ValueError):
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def answering(data: bytes) -> Callable[[socket.socket], None]:
    """Return what answers every request with some bytes."""

    def talk(sock: socket.socket) -> None:
        asked = b""
        while b"rt-secret" not in asked:  # what is left unread would reset the connection
            asked += sock.recv(65536)
        sock.sendall(data)

    return talk


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for `localhost` and its key; who vouches for it stands in `authority.pem` beside it."""
    return make_certificate(tmp_path, "localhost")[1]


def _whole_request(sock: socket.socket) -> bytes:
    """Return a request to the end of its body: a socket closed with unread bytes would reset the connection."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += _some(sock)
    head, _, body = asked.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
    while len(body) < length:
        body += _some(sock)
    return head + b"\r\n\r\n" + body


def _some(sock: socket.socket) -> bytes:
    if data := sock.recv(65536):
        return data
    raise ValueError("the client has gone")


def over_tls(certificate: Path, seen: list[bytes]) -> Callable[[socket.socket], None]:
    """Return a TLS server that keeps what it was sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def talk(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            seen.append(_whole_request(wrapped))
            wrapped.sendall(OK)

    return talk


def test_a_server_nobody_vouches_for_gets_nothing(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an unknown certificate nor one for another name; with a trusted one the twin works."""
    seen: list[bytes] = []
    with server(over_tls(certificate, seen)) as port:
        with pytest.raises(UnreachableError) as caught:
            post(f"https://localhost:{port}/token", "application/json", b"rt-secret")
        assert (caught.value.reason, caught.value.sent) == ("certificate-not-trusted", False)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "authority.pem"))
        with pytest.raises(UnreachableError) as caught:
            post(f"https://127.0.0.1:{port}/token", "application/json", b"rt-secret")
        assert caught.value.reason == "certificate-not-trusted"
        assert not any(seen)

        assert post(f"https://localhost:{port}/token", "application/json", b"rt-secret").body == b"{}"

    assert seen[-1].startswith(b"POST /token HTTP/1.1\r\n")


def test_it_goes_through_a_proxy_by_connect(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy sees the name and its own password, and never the request; `no_proxy` and loopback http go direct."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "authority.pem"))
    seen: list[bytes] = []
    heads: list[bytes] = []
    inner = over_tls(certificate, seen)

    def talk(sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:  # http.client writes it in several pieces
            head += sock.recv(65536)
        heads.append(head)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        inner(sock)

    with server(talk) as port, server(over_tls(certificate, seen)) as direct:
        send = poster({"https_proxy": f"http://user:pass@127.0.0.1:{port}"})
        assert send(Request("https://localhost:1234/token", "application/json", b"rt-secret")).status == 200
        excepted = poster({"https_proxy": "http://127.0.0.1:9", "no_proxy": "localhost"})
        assert excepted(Request(f"https://localhost:{direct}/token", "application/json", b"x")).status == 200

    assert heads[0].startswith(b"CONNECT localhost:1234 HTTP/1.")
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz" in heads[0]
    assert b"rt-secret" not in heads[0]
    assert "pass" not in repr(Proxy("h", 1, "Basic pass"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "connection-lost"),
        (b"SSH-2.0-x\r\n", "answer-not-http"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", "answer-cut-off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "answer-cut-off"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", "answer-not-http"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, "answer-not-http"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 600_000, "answer-too-big"),
    ],
)
def test_answers_have_bounds(answer: bytes, reason: str) -> None:
    """Whatever comes, the error is a word."""
    with server(answering(answer)) as port, pytest.raises(UnreachableError) as caught:
        post(f"http://127.0.0.1:{port}/", "application/json", b"rt-secret")

    assert caught.value.reason == reason
    assert caught.value.sent
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("drip", [b"H", b"HTTP/1.1 200 OK\r\nX: "])
def test_the_deadline_is_for_all_of_it(drip: bytes) -> None:
    """A head that comes byte by byte, and a handshake that does: both end in time."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(drip)
        for _ in range(200):
            time.sleep(0.05)
            sock.sendall(b"\x16" if len(drip) == 1 else b"y")

    scheme = "https" if len(drip) == 1 else "http"
    began = time.monotonic()
    with server(talk) as port, pytest.raises(UnreachableError) as caught:
        post(f"{scheme}://localhost:{port}/", "application/json", b"x", deadline_s=0.5)

    assert time.monotonic() - began < 3
    assert caught.value.reason in ("timeout", "tls-failed")


def test_silence_ends_in_time_and_refusal_at_once() -> None:
    """A server that says nothing, in TLS as well, and one that is not there."""
    with server(lambda _: time.sleep(2)) as port:
        for scheme in ("http", "https"):
            began = time.monotonic()
            with pytest.raises(UnreachableError) as caught:
                post(f"{scheme}://localhost:{port}/", "application/json", b"x", deadline_s=0.4)
            assert caught.value.reason == "timeout"
            assert time.monotonic() - began < 1.5
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError) as caught:
            post(f"http://127.0.0.1:{unused.getsockname()[1]}/", "application/json", b"x")
    assert (caught.value.reason, caught.value.sent) == ("connection-refused", False)
