"""The fast paths of model calls against the general ones: whatever they take, they take as those would."""

from __future__ import annotations

import asyncio
import json
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloister.egress.http1 import Body, Headers, HttpError
from cloister.llm import peek
from cloister.llm.routes import Shape
from cloister.llm.usage import Meter, read_answer
from cloister.relay.connection import HttpConnection
from cloister.relay.exchange import Exchange
from cloister.relay.session import Limits
from cloister.relay.upstream import HttpUpstream
from cloister.relay.whole_answer import WholeAnswer, read_whole, written

HEAD = b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: x\r\nx-api-key: k\r\nContent-Length: %d\r\nAccept: */*\r\n\r\n"
LINES = st.sampled_from(
    [
        b"Content-Type: application/json", b"request-id: r1", b"Server:x", b"Via:  two", b"X-Space: a b \t",
        b"Connection: keep-alive", b"Connection: close", b"connection: x-hop", b"Keep-Alive: timeout=5", b"X-Hop: 1",
        b"Transfer-Encoding: chunked", b"Content-Length: 2", b"content-length: 2", b"Content-Length: 02",
        b"Content-Length: +2", b"Content-Length: 2, 2", b"Content-Length : 2",
        b" folded: 1", b"\tfolded", b"bad name: 1",
        b"no-colon", b": empty", b"Bell: \x07", b"Nul: \x00", b"High: \xff", b"Set-Cookie: a", b"Set-Cookie: b",
        b"Upgrade: h2c", b"Trailer: x", b"", b"X: a\nY: b", b"X: a\rY: b", b"Empty:", b"Expect: 100-continue",
    ]
)  # fmt: skip
STARTS = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"HTTP/1.1 200 ", b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No Content",
     b"HTTP/1.1 100 Continue", b"HTTP/1.1 2000 OK", b"http/1.1 200 OK", b"HTTP/1.1  200 OK", b"HTTP/1.1 299 \xe9"]
)  # fmt: skip
BODIES = st.sampled_from([b"{}", b"", b"{", b"{}\r\n", b"{}HTTP/1.1 200 OK\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n"])


Asked = tuple[str, bytes, tuple[tuple[bytes, bytes], ...], Body, bool, bytes, int, tuple[tuple[bytes, bytes], ...]]
"""Method, target, fields, framing, whether the connection stays, body, bytes counted, trailers."""


class Taker:
    """Takes an answer in pieces."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.head: tuple[int, bytes, Headers, Body] | None = None
        self.body = b""
        self.ended = self.failed = False

    def on_interim(self, status: int, phrase: bytes, headers: Headers) -> None:
        """Take it."""

    def on_response(self, status: int, phrase: bytes, headers: Headers, body: Body) -> None:
        """Take it."""
        self.head = (status, phrase, headers, body)

    def on_response_body(self, data: bytes) -> None:
        """Take it."""
        self.body += data

    def on_response_end(self, trailers: Headers) -> None:  # noqa: ARG002 - all ends are the same here
        """Take it."""
        self.ended = True

    def on_switch(self, phrase: bytes, headers: Headers, rest: bytes) -> None:  # noqa: ARG002 - all ends are the same here
        """Take it."""
        self.failed = True

    def on_failure(self, error: HttpError) -> None:  # noqa: ARG002 - all ends are the same here
        """Take it."""
        self.failed = True

    def on_pressure(self, *, paused: bool) -> None:
        """Take it."""


def general(data: bytes) -> tuple[Taker, bool]:
    """Read an answer with llhttp; return it, and whether the connection may be used again."""

    async def read() -> tuple[Taker, bool]:
        upstream, taker = HttpUpstream(), Taker()
        upstream.connection_made(mock.MagicMock(asyncio.Transport, is_closing=lambda: False))
        upstream.begin(taker, "POST", b"", Body("length"))
        upstream.end_body([])
        upstream.data_received(data)
        return taker, upstream.reusable

    return asyncio.run(read())


@given(STARTS, st.lists(LINES, max_size=5), BODIES)
@example(b"HTTP/1.1 200 OK", [b"Content-Type: application/json", b"Content-Length: 2"], b"{}")
def test_an_answer_that_is_taken_at_once_is_what_llhttp_finds(start: bytes, lines: list[bytes], body: bytes) -> None:
    """Status, phrase, fields and body are the same, and the connection may be kept."""
    data = b"\r\n".join([start, *lines, b"", body])
    answer = read_whole(data)
    if answer is None:
        return
    taker, reusable = general(data)
    assert taker.head == (answer.status, answer.phrase, answer.headers, Body("length", len(answer.content)))
    assert (taker.body, taker.ended, taker.failed, reusable) == (answer.content, True, False, True)
    again = read_whole(written(answer, frozenset()))
    assert again is not None
    assert again.content == answer.content
    assert set(again.named) == set(answer.named) - {b"connection", b"keep-alive"}


def test_an_ordinary_answer_is_taken_at_once() -> None:
    """Without this, the test above could pass by taking nothing."""
    data = b"HTTP/1.1 200 OK\r\nDate: now\r\nConnection: keep-alive\r\nContent-Length: 2\r\nSet-Cookie: a\r\n\r\n{}"
    answer = read_whole(data)
    assert isinstance(answer, WholeAnswer)
    assert written(answer, frozenset({b"set-cookie"})) == b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 2\r\n\r\n{}"


class Whole:
    """Takes a request's body, answers at its end, and tells what it was."""

    def __init__(self, exchange: Exchange, found: list[Asked]) -> None:
        """Take one request."""
        self.exchange, self.found, self.body = exchange, found, b""

    def write_body(self, data: bytes) -> None:
        """Take a piece."""
        self.body += data

    def end_body(self, trailers: Headers) -> None:
        """Tell, and answer."""
        one = self.exchange
        head = (one.method, one.url, tuple(one.headers), one.body, one.keep_alive)
        self.found.append((*head, self.body, one.bytes_up, tuple(trailers)))
        one.respond_whole(200, b"ok")

    def abandon(self) -> None:
        """Nothing was promised."""


def served(*reads: bytes) -> tuple[list[Asked], bytes]:
    """Return the requests that a connection makes of some reads, each answered at once, and what it wrote."""

    async def read() -> tuple[list[Asked], bytes]:
        found: list[Asked] = []
        connection = HttpConnection(
            Limits(), lambda exchange: exchange.attach(Whole(exchange, found)), lambda _, error: error.reason.encode()
        )
        transport = mock.MagicMock(asyncio.Transport, is_closing=lambda: False)
        connection.connection_made(transport)
        for data in reads:
            connection.data_received(data)
            await asyncio.sleep(0)
        return found, b"".join(call.args[0] for call in transport.write.call_args_list)

    return asyncio.run(read())


@given(
    st.integers(0, 40), st.integers(-2, 2), st.lists(st.tuples(st.integers(0, 140), st.binary(max_size=3)), max_size=2)
)
def test_a_request_is_the_same_whether_its_head_was_known_or_not(
    size: int, more: int, changes: list[tuple[int, bytes]]
) -> None:
    """Any bytes behind a first request give what they would give if nothing had been remembered."""
    first = HEAD % 5 + b"first"
    second = bytearray(HEAD % size + b"x" * max(0, size + more))
    for place, new in changes:
        second[place : place + len(new)] = new
    with mock.patch("cloister.relay.connection.remember", return_value=None):
        plain = served(first, bytes(second))
    # The first request is read as a whole, so what is behind it finds its head known.
    assert served(first, bytes(second)) == plain


def test_a_head_that_is_known_is_not_read_again() -> None:
    """Without this, the test above could pass by remembering nothing."""
    again = mock.Mock(wraps=Exchange.again)
    with mock.patch.object(Exchange, "again", again):
        found, _ = served(HEAD % 5 + b"first", HEAD % 12 + b"twelve bytes", HEAD % 1 + b"1")
    assert again.call_count == 2
    assert [one[5] for one in found] == [b"first", b"twelve bytes", b"1"]
    assert found[1][2][2] == (b"Content-Length", b"12")


@pytest.mark.parametrize(
    "line", [b"Expect: 100-continue", b"Connection: close", b"Upgrade: h2c", b"Transfer-Encoding: x"]
)
def test_heads_that_are_not_ordinary_are_read_each_time(line: bytes) -> None:
    """What steers the connection is never remembered."""
    again = mock.Mock(wraps=Exchange.again)
    with mock.patch.object(Exchange, "again", again):
        served(*[HEAD.replace(b"Accept: */*", line) % 2 + b"{}"] * 3)
    assert not again.called


COUNTS = st.one_of(st.none(), st.integers(-5, 10**15), st.floats(allow_nan=False, allow_infinity=False), st.just("x"))
NAMES = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "prompt_tokens",
    "completion_tokens", "cost",
)  # fmt: skip
INNER = st.dictionaries(
    st.sampled_from(["cached_tokens", "reasoning_tokens", "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"]),
    COUNTS,
)
USAGE = st.dictionaries(
    st.sampled_from([*NAMES, "cache_creation", "output_tokens_details", "prompt_tokens_details"]), COUNTS | INNER
)
ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "usage": USAGE, "model": st.sampled_from(["m", "", None]), "message": st.fixed_dictionaries({"usage": USAGE}),
        "timings": st.fixed_dictionaries({"prompt_n": COUNTS}), "text": st.text(max_size=5),
    },
)  # fmt: skip


@given(ANSWERS, st.sampled_from(["anthropic", "chat", "responses"]), st.integers(0, 3))
@example(
    {"usage": {"input_tokens": 3, "output_tokens": 4, "cache_creation": {"ephemeral_1h_input_tokens": 2}}},
    "anthropic",
    0,
)
def test_an_answer_read_at_once_is_counted_as_by_the_meter(answer: dict[str, object], shape: Shape, cut: int) -> None:
    """Usage, source and model are the same, also of what is no whole JSON."""
    text = json.dumps(answer).encode()
    text = text[: len(text) - cut]
    meter = Meter(shape, stream=False)
    meter.feed(text)
    assert read_answer(text, shape) == meter.finish()


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["model", "stream", "n", "é", 'q"', "mod\\u0065l"]),
        st.sampled_from(["1", '"a"', "[1, 2]", '{"a":1}']),
    ),
    max_size=4,
)


@given(MEMBERS, st.sampled_from(["", " ", "\n"]), st.sampled_from(["", " "]))
def test_members_written_without_spaces_stand_where_the_general_path_finds_them(
    pairs: list[tuple[str, str]], before: str, within: str
) -> None:
    """The quick look gives the same places, and refuses or leaves what the other one refuses."""
    inside = f",{within}".join(f'"{name}":{within}{value}'.replace('q""', 'q\\""') for name, value in pairs)
    text = f"{before}{{{inside}}}".encode()
    found: list[object] = []
    for look in (peek._compact, lambda _text, _values: None):
        with mock.patch.object(peek, "_compact", look):
            try:
                found.append(peek.members(text))
            except peek.BodyError as error:
                found.append(error.reason)
    assert found[0] == found[1]
