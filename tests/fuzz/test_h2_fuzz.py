"""Any frames at an end of HTTP/2 and any bytes at an end of TLS: no error escapes, and every request ends once."""

from __future__ import annotations

import asyncio
import ssl
import time

from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.credentials.certificates import make_authority
from cloister.egress import denial
from cloister.egress.decision import Verdict
from cloister.egress.hosts import parse_host
from cloister.egress.http1 import Body, RequestLine
from cloister.relay.authority import Authority
from cloister.relay.h2_client import H2Client
from cloister.relay.h2_server import H2Connection
from cloister.relay.lanes import Outgoing
from cloister.relay.session import Limits
from cloister.relay.tls import TlsLayer
from cloister.relay.trust import client_context

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = [(":method", "POST"), (":scheme", "https"), (":authority", "a.test"), (":path", "/")]
NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1])
FRAMES = st.tuples(st.integers(0, 12), st.sampled_from([0, 1, 4, 5, 8, 0x20, 0xFF]), NUMBERS, st.binary(max_size=40))
GOOD = st.sampled_from(
    ["open", "open-end", "data", "data-end", "reset", "widen", "settings", "ping", "trailers", "goodbye"]
)
AUTHORITY = Authority(make_authority(time.time()))


class Wire(asyncio.Transport):
    """A transport that remembers how much was written."""

    def __init__(self) -> None:
        super().__init__()
        self.closing, self.size = False, 0

    def write(self, data: bytes) -> None:
        """Count."""
        assert not self.closing
        self.size += len(data)

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        """Accept."""

    def pause_reading(self) -> None:
        """Accept."""

    def resume_reading(self) -> None:
        """Accept."""

    def can_write_eof(self) -> bool:
        """No half-close."""
        return False

    def is_closing(self) -> bool:
        """Say whether it was closed."""
        return self.closing

    def close(self) -> None:
        """Remember."""
        self.closing = True

    abort = close


class Answering:
    """A handler that answers each request with its body, at its end."""

    def __init__(self, exchange) -> None:
        self.exchange, self.gone = exchange, 0
        exchange.respond(200, b"", [], Body("close"))
        exchange.connection.on_pressure(lambda _paused: None)
        exchange.attach(self)

    def write_body(self, data: bytes) -> None:
        """Send it back."""
        self.exchange.respond_body(data)

    def end_body(self, trailers) -> None:
        """Finish."""
        self.exchange.respond_end(trailers)

    def abandon(self) -> None:
        """Count: once at most."""
        self.gone += 1
        assert self.gone == 1


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    """Write a frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload


class Story:
    """Frames that make sense, one after the other."""

    def __init__(self, client: bool = True) -> None:
        self.encoder, self.number, self.client = Encoder(), -1, client

    def tell(self, what: str) -> bytes:
        """Return the bytes of one step."""
        if what in {"open", "open-end"}:
            self.number += 2
            block = self.encoder.encode(HEAD if self.client else [(":status", "200")])
            return frame(1, 4 if what == "open" else 5, self.number, block)
        at = max(self.number, 1)
        if what == "trailers":
            return frame(1, 5, at, self.encoder.encode([("x-sum", "1")]))
        return {
            "data": frame(0, 0, at, b"x" * 100), "data-end": frame(0, 1, at, b"y"), "reset": frame(3, 0, at, bytes(4)),
            "widen": frame(8, 0, at, b"\0\0\1\0"), "settings": frame(4, 0, 0, b"\0\4\0\0\0\5"),
            "ping": frame(6, 0, 0, bytes(8)), "goodbye": frame(7, 0, 0, bytes(8)),
        }[what]  # fmt: skip


@settings(max_examples=100)
@given(st.lists(GOOD | FRAMES | st.binary(max_size=30), max_size=25), st.integers(1, 50))
def test_any_frames_of_a_client_are_served_or_cut_off(steps, cut):
    """Whatever a client sends, in pieces of any size: no bug is reported, and at its end nothing is left behind."""

    async def scenario():
        problems: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
        connection, wire = H2Connection(Limits(), Answering, refused), Wire()
        connection.connection_made(wire)
        story = Story()
        data = (
            PREFACE
            + frame(4, 0, 0, b"")
            + b"".join(
                story.tell(step) if isinstance(step, str) else frame(*step) if isinstance(step, tuple) else step
                for step in steps
            )
        )
        for at in range(0, len(data), cut):
            connection.data_received(data[at : at + cut])
            if at % 5 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        connection.sweep(asyncio.get_running_loop().time() + 10_000)
        await asyncio.sleep(0)
        connection.connection_lost(None)
        assert not connection.channels
        assert not problems, problems
        assert wire.size < 200_000

    asyncio.run(scenario())


def refused(error) -> Verdict:
    """Refuse what cannot be read."""
    assert denial.denial_status(error.reason) >= 400
    return Verdict("deny", error.reason, explanation=error.explanation)


class Receiving:
    """Takes a response; it ends once, in one way."""

    def __init__(self) -> None:
        self.ends = 0

    def on_interim(self, status, phrase, headers) -> None:
        """Take it."""

    def on_pressure(self, *, paused) -> None:
        """Take it."""

    def on_response_body(self, _data) -> None:
        """Take it."""

    def on_response(self, status, _phrase, _headers, _body) -> None:
        """A head comes before the end."""
        assert self.ends == 0
        assert status >= 200

    def on_response_end(self, _trailers) -> None:
        """Count."""
        self.ends += 1

    def on_failure(self, _error) -> None:
        """Count."""
        self.ends += 1


@settings(max_examples=100)
@given(st.lists(GOOD | FRAMES | st.binary(max_size=30), max_size=25), st.integers(1, 50))
def test_any_frames_of_a_server_end_each_request_once(steps, cut):
    """Whatever a server sends, each request ends exactly once, and no bug is reported."""

    async def scenario():
        problems: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
        client, wire = H2Client(), Wire()
        client.connection_made(wire)
        receivers = [Receiving() for _ in range(3)]
        line = RequestLine(parse_host("a.test"), 443, "/", 443)
        for receiver, body in zip(receivers, (Body("none"), Body("chunked"), Body("length", 5)), strict=True):
            client.stream().begin(receiver, Outgoing("POST", line, [], body))
        story = Story(client=False)
        data = frame(4, 0, 0, b"") + b"".join(
            story.tell(step) if isinstance(step, str) else frame(*step) if isinstance(step, tuple) else step
            for step in steps
        )
        for at in range(0, len(data), cut):
            client.data_received(data[at : at + cut])
        await asyncio.sleep(0)
        client.connection_lost(None)
        assert [receiver.ends for receiver in receivers] == [1, 1, 1]
        assert not problems, problems

    asyncio.run(scenario())


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=6), st.booleans(), st.booleans())
def test_any_bytes_at_an_end_of_tls_are_refused_quietly(pieces, server_side, after_hello):
    """Bytes that are no TLS end the handshake with an error for people; none escapes, and nothing was let in."""

    async def scenario():
        chosen = []
        context = AUTHORITY.context("a.test") if server_side else client_context(True)
        layer = TlsLayer(context, chosen.append, server_side=server_side, host="" if server_side else "a.test")
        wire = Wire()
        layer.connection_made(wire)
        if after_hello and server_side:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            peer = client_context(True).wrap_bio(incoming, outgoing, server_hostname="a.test")
            try:
                peer.do_handshake()
            except ssl.SSLWantReadError:
                layer.data_received(outgoing.read())
        for piece in pieces:
            layer.data_received(piece)
        layer.eof_received()
        layer.connection_lost(None)
        assert layer.ready.exception() is not None
        assert chosen == []

    asyncio.run(scenario())
