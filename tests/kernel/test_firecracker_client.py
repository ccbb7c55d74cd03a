"""A Firecracker that its guest has taken over may answer anything: the client is bounded, and believes nothing."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from cloister.errors import StepError, render
from cloister.host import firecracker
from cloister.host.firecracker import FirecrackerApi

pytestmark = pytest.mark.kernel
Talk = Callable[[socket.socket], None]


class Monitor:
    """A Unix socket that does with each connection what the test says."""

    def __init__(self, path: Path, talk: Talk) -> None:
        self.path, self.talk, self.heard = path, talk, list[bytes]()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen(8)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Take one connection after the other."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                with client, contextlib.suppress(OSError):
                    data = b""
                    while b"\r\n\r\n" not in data and (piece := client.recv(4096)):
                        data += piece
                    if data:
                        self.heard.append(data)
                        self.talk(client)

    def close(self) -> None:
        """Listen no more."""
        self.server.close()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[Talk | bytes], tuple[Monitor, FirecrackerApi]]]:
    """A monitor that talks so, or answers with these bytes, and a client of it."""
    made: list[Monitor] = []

    def make(talk: Talk | bytes) -> tuple[Monitor, FirecrackerApi]:
        data = talk
        monitor = Monitor(tmp_path / f"{len(made)}.sock", talk if callable(talk) else lambda link: link.sendall(data))
        made.append(monitor)
        return monitor, FirecrackerApi(str(monitor.path))

    yield make
    for monitor in made:
        monitor.close()


def refused(api: FirecrackerApi) -> StepError:
    """Return what a call ends with, within seconds."""
    began = time.monotonic()
    with pytest.raises(StepError) as caught:
        asyncio.run(api.call("PUT", "/vsock", b"{}"))
    assert time.monotonic() - began < 20
    return caught.value


def test_a_request_and_its_answer(answering: Callable[..., tuple[Monitor, FirecrackerApi]]) -> None:
    """The twin of all below: well-formed answers are understood, with and without a body."""
    monitor, api = answering(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")
    assert asyncio.run(api.call("PUT", "/vsock", b'{"a":1}')).status == 204
    (heard,) = monitor.heard
    assert heard.startswith(b"PUT /vsock HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n")
    assert heard.endswith(b'Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{"a":1}')
    body = b'{"id":"a","state":"Running","vmm_version":"1.16.1","app_name":"Firecracker"}'
    _, api = answering(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:%d\r\n\r\n%b" % (len(body), body)
    )
    assert asyncio.run(api.state()) == "Running"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 204",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 2O4 \r\n\r\n",
        b"HTTP/1.1 -04 \r\n\r\n",
        b"HTTP/1.1 \xb2\xb0\xb4 \r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfive.",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * (firecracker.MAX_ANSWER + 10),
    ],
)
def test_answers_that_are_none(answering: Callable[..., tuple[Monitor, FirecrackerApi]], data: bytes) -> None:
    """What is no answer, ends early or is too long, is a monitor that broke off; never more is kept than the bound."""
    _, api = answering(data)

    assert refused(api).reference == "firecracker-silent"


def test_a_head_without_an_end(answering: Callable[..., tuple[Monitor, FirecrackerApi]]) -> None:
    """One that sends and sends is cut off at the bound, not when memory is full."""
    sent = 0

    def flood(link: socket.socket) -> None:
        nonlocal sent
        while True:
            sent += link.send(b"X: " + b"a" * 60000 + b"\r\n")

    _, api = answering(flood)

    assert refused(api).reference == "firecracker-silent"
    assert sent < 8 * firecracker.MAX_ANSWER


def test_one_that_says_nothing(
    answering: Callable[..., tuple[Monitor, FirecrackerApi]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence ends with the time limit, and says what was asked."""
    monkeypatch.setattr(firecracker, "ANSWERS_S", 0.3)
    gone = threading.Event()
    _, api = answering(lambda _: gone.wait(10) and None)

    error = refused(api)
    gone.set()

    assert error.reference == "firecracker-silent"
    assert "PUT /vsock" in error.message


def test_one_that_never_listens(tmp_path: Path) -> None:
    """A monitor that does not come up is an error after the time limit, not a wait for ever."""
    with pytest.raises(StepError, match="did not listen"):
        asyncio.run(FirecrackerApi(str(tmp_path / "none")).appear(0.2))


def test_reasons_are_cut_and_harmless(answering: Callable[..., tuple[Monitor, FirecrackerApi]]) -> None:
    """A reason is shown shortened, and without anything that steers a terminal."""
    body = b'{"fault_message":"No.\\n\\u001b[2J\\u001b]0;x\\u0007 %b"}' % (b"a" * 10000)
    _, api = answering(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    error = refused(api)

    assert error.reference == "firecracker-refused"
    assert error.message.startswith("firecracker refused PUT /vsock: No. ")
    assert len(error.message) < 600
    assert "\x1b" not in render(error)


def test_no_link_is_followed(tmp_path: Path, answering: Callable[..., tuple[Monitor, FirecrackerApi]]) -> None:
    """A monitor that puts a link in the place of its socket leads us to no other program's."""
    victim, direct = answering(b"HTTP/1.1 204 \r\n\r\n")
    link = tmp_path / "api.sock"
    link.symlink_to(victim.path)
    error = refused(FirecrackerApi(str(link)))

    assert error.reference == "firecracker-silent"
    assert victim.heard == []
    assert asyncio.run(direct.call("PUT", "/vsock")).status == 204


@pytest.mark.parametrize("kind", ["file", "fifo", "directory"])
def test_only_a_socket_is_one(tmp_path: Path, kind: str) -> None:
    """Other things in the place of the socket are refused at once; a pipe without a writer does not hold us up."""
    path = tmp_path / "api.sock"
    {"file": path.touch, "fifo": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()

    assert refused(FirecrackerApi(str(path))).reference == "firecracker-silent"
    with pytest.raises(StepError, match="cannot be used"):
        asyncio.run(FirecrackerApi(str(path)).appear(5))


def test_only_our_own_process_is_asked(answering: Callable[..., tuple[Monitor, FirecrackerApi]]) -> None:
    """A socket on which another user listens is not spoken to."""
    monitor, _ = answering(b"HTTP/1.1 204 \r\n\r\n")
    stranger = FirecrackerApi(str(monitor.path), owner=os.geteuid() + 1)

    assert "another user" in refused(stranger).message
    assert monitor.heard == []


def test_long_paths_are_no_matter(tmp_path: Path) -> None:
    """The directory of a run may be deeper than a socket's address is long (108 bytes, unix(7))."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    before = Path.cwd()
    os.chdir(deep)
    try:
        monitor = Monitor(Path("api.sock"), lambda link: link.sendall(b"HTTP/1.1 204 \r\n\r\n"))
    finally:
        os.chdir(before)

    assert asyncio.run(FirecrackerApi(str(deep / "api.sock")).call("PUT", "/vsock")).status == 204
    monitor.close()


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=100).map(lambda rest: b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + rest),
        st.binary(max_size=60).map(lambda rest: b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%b" % (len(rest), rest)),
    )
)
def test_no_bytes_break_the_reader(data: bytes) -> None:
    """Whatever comes: an answer, or one of the three errors that `call` turns into one for people."""

    async def read() -> None:
        reader = asyncio.StreamReader(limit=firecracker.MAX_ANSWER)
        reader.feed_data(data)
        reader.feed_eof()
        with contextlib.suppress(EOFError, ValueError):
            answer = await firecracker._read_answer(reader)
            assert 0 <= answer.status <= 999
            assert isinstance(firecracker._fault(answer), str)

    asyncio.run(read())
