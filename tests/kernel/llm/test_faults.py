"""Upstreams and clients that misbehave: nothing hangs, no row is lost or counted twice, nobody else notices."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from support.inference import (
    DELTA,
    FIRST_EVENT,
    JSON,
    LAST_EVENTS,
    MODEL,
    OK,
    STREAM_HEAD,
    Bystander,
    answer,
    call,
    chunk,
    probe,
    proxied,
    read_all,
    request,
    send,
)

pytestmark = pytest.mark.kernel

GIB = 1 << 30
BEGUN = STREAM_HEAD + chunk(FIRST_EVENT) + chunk(DELTA)
GROWTH_MB = 60.0
"""How much memory a fault may cost: buffers of some connections, never a body."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home for the proxy."""
    return tmp_path / "proxy"


def unframed_lines() -> list[bytes]:
    """Return the head of a request on a connection that stays, without what says where its body ends."""
    head = request(close=False).partition(b"\r\n\r\n")[0]
    return [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]


def test_a_sound_upstream_is_passed_through(home):
    """The positive twin of all that follows: whole answers, whole streams, one row each with the upstream's count."""
    with proxied(home) as (proxy, upstream):
        assert call(proxy.port) == (200, JSON)
        status, body = call(proxy.port, stream=True)
        assert (status, body) == (200, FIRST_EVENT + DELTA + LAST_EVENTS)
        proxy.end()
        rows = proxy.dispatched()
        assert len(rows) == len(upstream.requests) == 2
        assert {(row["input_tokens"], row["output_tokens"], row["source"]) for row in rows} == {(7, 5, "provider")}
        assert {(row["outcome"], row["status"]) for row in rows} == {("complete", 200)}


def test_a_slow_upstream_is_given_up_in_time(home):
    """Silence ends with 504 after the time the policy gives, with one row that counts the call as it may be billed."""

    def silent(conn, _request):
        conn.settimeout(20)
        conn.recv(1)

    with proxied(home, silent, first_byte="1s") as (proxy, upstream), Bystander(proxy) as other:
        began = time.monotonic()
        got = send(proxy.port, request())
        assert got.startswith(b"HTTP/1.1 504 ")
        assert b"x-cloister-reason: first-byte-timeout" in got
        assert 0.9 < time.monotonic() - began < 5
        other.check()
        proxy.end()
        (row,) = proxy.dispatched()
        assert len(upstream.requests) == 1
        assert (row["outcome"], row["status"], row["source"]) == ("upstream-failed", 504, "estimated")
        assert row["output_tokens"] == 64


def test_a_slow_stream_is_given_up_when_it_falls_silent(home):
    """A stream may take any time as long as it moves; silence ends it with an error event and without a clean end."""

    def falls_silent(conn, _request):
        conn.sendall(BEGUN)
        conn.settimeout(20)
        conn.recv(1)

    with proxied(home, falls_silent, idle="1s") as (proxy, _), Bystander(proxy) as other:
        got = send(proxy.port, request(stream=True))
        assert DELTA in got
        assert b"event: error\n" in got
        assert not got.endswith(b"0\r\n\r\n")
        other.check()
        proxy.end()
        (row,) = proxy.dispatched()
        assert (row["outcome"], row["source"]) == ("truncated", "estimated")
        assert row["input_tokens"] == 7


def test_a_dead_upstream_is_said_at_once_and_costs_nothing(home):
    """Nothing listens: 502, and what never left is not counted as used."""
    with proxied(home) as (proxy, upstream), Bystander(proxy) as other:
        upstream.listener.shutdown(socket.SHUT_RDWR)
        upstream.listener.close()
        began = time.monotonic()
        got = send(proxy.port, request())
        assert got.startswith(b"HTTP/1.1 502 ")
        assert b"connect-failed" in got
        assert time.monotonic() - began < 5
        other.check()
        proxy.end()
        rows = proxy.dispatched()
        assert [row["outcome"] for row in rows] == ["upstream-failed"]
        assert sum(row["input_tokens"] + row["output_tokens"] for row in rows) == 0
        assert upstream.requests == []


def test_an_upstream_that_hangs_up_before_it_answers(home):
    """The request arrived, so it counts as billed: one row, 502, and no second attempt that nobody asked for."""

    def hangs_up(_conn, _request):
        return False

    with proxied(home, hangs_up) as (proxy, upstream):
        assert send(proxy.port, request()).startswith(b"HTTP/1.1 502 ")
        proxy.end()
        (row,) = proxy.dispatched()
        assert len(upstream.requests) == 1
        assert (row["outcome"], row["source"], row["output_tokens"]) == ("upstream-failed", "estimated", 64)


def test_a_kept_connection_that_breaks_is_tried_once_more(home):
    """It may have been closing when the request came; the row says how often the request was sent."""
    seen = []

    def hangs_up_on_the_second(conn, data):
        seen.append(data)
        return answer(conn, data) if len(seen) != 2 else False

    with proxied(home, hangs_up_on_the_second) as (proxy, upstream):
        assert [call(proxy.port) for _ in range(3)] == [(200, JSON)] * 3
        proxy.end()
        rows = proxy.dispatched()
        assert [row["attempts"] for row in rows] == [1, 2, 1]
        assert sum(row["attempts"] for row in rows) == len(upstream.requests) == 4


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"", id="half-closed"),
        pytest.param(b"zz\r\nthis is no chunk", id="garbage-for-a-chunk"),
        pytest.param(b"ffffffffffffffff1\r\nx", id="a-chunk-size-beyond-64-bits"),
        pytest.param(b"5\r\nhelloXX", id="a-chunk-without-its-end"),
        pytest.param(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", id="500-in-mid-stream"),
        pytest.param(b"0\r\n\r\n", id="a-clean-end-without-the-last-event"),
    ],
)
def test_a_stream_that_breaks_off_never_looks_whole(home, rest):
    """What came is passed on, then an error event says that it broke off; the row tells what arrived, once."""

    def breaks_off(conn, _request):
        conn.sendall(BEGUN + rest)
        conn.shutdown(socket.SHUT_WR)
        conn.settimeout(5)
        conn.recv(1)

    with proxied(home, breaks_off) as (proxy, upstream), Bystander(proxy) as other:
        got = send(proxy.port, request(stream=True))
        assert got.startswith(b"HTTP/1.1 200 ")
        assert DELTA in got
        assert b"event: error\n" in got
        assert b"message_stop" not in got
        assert not got.endswith(b"0\r\n\r\n")
        other.check()
        proxy.end()
        (row,) = proxy.dispatched()
        assert len(upstream.requests) == 1
        assert (row["outcome"], row["source"], row["input_tokens"]) == ("truncated", "estimated", 7)
        assert 0 < row["output_tokens"] <= 64


def test_an_answer_shorter_than_it_said_is_broken_for_the_client_too(home):
    """A client that counts bytes must see that some are missing."""

    def short(conn, _request):
        conn.sendall(OK.replace(b"Content-Length: %d" % len(JSON), b"Content-Length: %d" % (len(JSON) + 50)))

    with proxied(home, short) as (proxy, _):
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            call(proxy.port)
        proxy.end()
        (row,) = proxy.dispatched()
        assert row["outcome"] == "truncated"


def test_bytes_beyond_an_answer_reach_nobody(home):
    """An answer longer than it said ends where it said; the next call does not find the rest in front of its own."""

    def long(conn, _request):
        conn.sendall(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON")
        return True

    with proxied(home, long) as (proxy, upstream):
        assert [call(proxy.port) for _ in range(3)] == [(200, JSON)] * 3
        proxy.end()
        assert len(proxy.dispatched()) == len(upstream.requests) == 3


def send_until_refused(conn: socket.socket, piece: bytes) -> None:
    """Send a piece of a mebibyte again and again, until nobody takes it: a gibibyte at most."""
    with contextlib.suppress(OSError):
        for _ in range(GIB >> 20):
            conn.sendall(piece)


def test_a_request_of_a_gibibyte_is_refused_before_it_is_read(home):
    """413 by its length alone; without a length, when the bound is reached. Memory stays."""
    lines = unframed_lines()
    with proxied(home) as (proxy, upstream), Bystander(proxy) as other:
        call(proxy.port)
        before = proxy.memory_mb()
        got = send(proxy.port, b"\r\n".join([*lines, b"Content-Length: %d" % GIB]) + b"\r\n\r\n" + b"{" * 65536)
        assert got.startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as conn:
            conn.sendall(b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n")
            send_until_refused(conn, chunk(b" " * (1 << 20)))
            got = read_all(conn)
            assert got == b"" or got.startswith(b"HTTP/1.1 413 ")  # a reset takes the answer along
        assert proxy.memory_mb("VmHWM") < before + 64 * 2.5 + GROWTH_MB  # the bound of one body is 64 MiB
        other.check()
        assert len(upstream.requests) == 1


@pytest.mark.timeout(180)
def test_an_answer_of_a_gibibyte_passes_in_bounded_memory(home):
    """It is passed on piece by piece, also to a client that reads slowly at first; the row is there."""
    piece = b"x" * (1 << 20)

    def huge(conn, _request):
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % GIB)
        for _ in range(GIB >> 20):
            conn.sendall(piece)

    with proxied(home, huge) as (proxy, _), Bystander(proxy) as other:
        before = proxy.memory_mb()
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as conn:
            conn.sendall(request())
            time.sleep(1)  # reads nothing: the upstream has to wait, not the memory to grow
            paused = proxy.memory_mb()
            into, taken = bytearray(1 << 20), 0
            while taken < GIB:
                taken += conn.recv_into(into)
        assert paused < before + GROWTH_MB
        assert proxy.memory_mb("VmHWM") < before + GROWTH_MB
        other.check(slowest_s=3.0)
        proxy.end()
        (row,) = proxy.dispatched()
        assert row["outcome"] == "complete"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([b"X-Bomb: " + b"a" * (8 << 20)], id="one-long-field"),
        pytest.param([b"X-%d: a" % number for number in range(50_000)], id="fifty-thousand-fields"),
    ],
)
def test_header_bombs_of_clients_are_refused(home, lines):
    """431 or a closed connection within bounded memory; nothing reaches the upstream."""
    head, _, body = request().partition(b"\r\n\r\n")
    with proxied(home) as (proxy, upstream), Bystander(proxy) as other:
        before = proxy.memory_mb()
        got = send(proxy.port, b"\r\n".join([head, *lines]) + b"\r\n\r\n" + body)
        assert got == b"" or got.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
        assert proxy.memory_mb("VmHWM") < before + GROWTH_MB
        other.check()
        assert upstream.requests == []


def test_header_bombs_of_upstreams_are_refused(home):
    """A head without an end is a bad gateway, not memory."""

    def bomb(conn, _request):
        conn.sendall(b"HTTP/1.1 200 OK\r\n")
        for number in range(100):
            conn.sendall(b"X-%d: %b\r\n" % (number, b"a" * 100_000))

    with proxied(home, bomb) as (proxy, _), Bystander(proxy) as other:
        before = proxy.memory_mb()
        assert send(proxy.port, request()).startswith(b"HTTP/1.1 502 ")
        assert proxy.memory_mb("VmHWM") < before + GROWTH_MB
        other.check()
        proxy.end()
        assert [row["outcome"] for row in proxy.dispatched()] == ["upstream-failed"]


def test_slowloris_holds_up_nobody(home):
    """Three hundred clients that send their heads and bodies byte by byte cost the other agent nothing."""
    with proxied(home) as (proxy, upstream):
        before = proxy.memory_mb()
        slow = [socket.create_connection(("127.0.0.1", proxy.port), timeout=5) for _ in range(300)]
        whole = request()
        with Bystander(proxy) as other:
            for position in range(0, 60, 4):
                for number, conn in enumerate(slow):
                    conn.sendall(whole[position : position + 4] if number % 2 else whole[:-20] if not position else b"")
                time.sleep(0.05)
        other.check()
        assert upstream.requests == []
        assert proxy.memory_mb() < before + GROWTH_MB
        for conn in slow:
            conn.close()
        assert call(proxy.port) == (200, JSON)


@pytest.mark.parametrize(
    "framing",
    [
        pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked", id="both"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5", id="both-the-other-way"),
        pytest.param(b"Content-Length: 5\r\nContent-Length: 6", id="two-lengths"),
        pytest.param(b"Content-Length: +5", id="a-signed-length"),
        pytest.param(b"Content-Length: 5, 5", id="a-list-of-lengths"),
        pytest.param(b"Transfer-Encoding: xchunked", id="an-unknown-coding"),
        pytest.param(b"Transfer-Encoding: chunked, identity", id="chunked-not-last"),
        pytest.param(b"Transfer-Encoding : chunked", id="a-space-before-the-colon"),
        pytest.param(b"X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: 5", id="a-folded-line"),
    ],
)
def test_smuggling_reaches_no_upstream(home, framing):
    """A request whose end two readers could see in two places is refused, and so is what may be hidden behind it."""
    hidden = request(text="smuggled")
    lines = unframed_lines()
    with proxied(home) as (proxy, upstream):
        got = probe(proxy.port, b"\r\n".join([*lines, framing]) + b"\r\n\r\n0\r\n\r\n" + hidden)
        assert got == b"" or got.startswith(b"HTTP/1.1 4")
        assert b" 200 " not in got
        assert upstream.requests == []
        assert call(proxy.port) == (200, JSON)


def test_smuggling_by_an_upstream_poisons_nobody(home):
    """An answer with two framings is a bad gateway; the next call has a connection of its own."""

    def two_ends(conn, data):
        if b"first" in data:
            conn.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + OK[:-1] + b"X"
            )
            return True
        return answer(conn, data)

    with proxied(home, two_ends) as (proxy, _):
        got = send(proxy.port, request(text="first"))
        assert got.startswith(b"HTTP/1.1 502 ")
        assert call(proxy.port) == (200, JSON)


def test_chunked_garbage_of_clients_is_refused(home):
    """A body that is no chunked body never becomes a call."""
    lines = unframed_lines()
    with proxied(home) as (proxy, upstream), Bystander(proxy) as other:
        for body in (b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"\xff\xfe\r\n"):
            got = probe(proxy.port, b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n" + body)
            assert got == b"" or got.startswith(b"HTTP/1.1 4"), got[:100]
        other.check()
        assert upstream.requests == []


def test_a_client_that_leaves_is_still_counted(home):
    """The stream is read on after the client has gone, and its row has the provider's own numbers."""
    go_on = threading.Event()

    def in_two(conn, _request):
        conn.sendall(BEGUN)
        go_on.wait(10)
        for _ in range(4):  # who is not there any more answers with a reset, which the next one meets
            conn.sendall(chunk(DELTA))
            time.sleep(0.1)
        conn.sendall(chunk(LAST_EVENTS) + b"0\r\n\r\n")
        return True

    with proxied(home, in_two) as (proxy, upstream):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as conn:
            conn.sendall(request(stream=True))
            got = b""
            while DELTA not in got:
                got += conn.recv(65536)
        go_on.set()
        time.sleep(0.8)
        proxy.end()
        (row,) = proxy.dispatched()
        assert len(upstream.requests) == 1
        assert (row["outcome"], row["source"], row["output_tokens"]) == ("client-left", "provider", 5)


def test_killed_in_mid_stream_every_call_has_one_row(home):
    """SIGKILL with twenty streams open: after the next start the ledger has each call once, and none twice."""

    def endless(conn, data):
        if b'"stream":true' not in data:
            return answer(conn, data)
        conn.sendall(BEGUN)
        conn.settimeout(20)
        conn.recv(1)
        return False

    with proxied(home, endless) as (proxy, upstream):
        for _ in range(5):
            assert call(proxy.port) == (200, JSON)
        open_ones = [socket.create_connection(("127.0.0.1", proxy.port), timeout=20) for _ in range(20)]
        for conn in open_ones:
            conn.sendall(request(stream=True))
        for conn in open_ones:
            got = b""
            while DELTA not in got:
                got += conn.recv(65536)
        proxy.end(signal.SIGKILL)
        for conn in open_ones:
            assert b"message_stop" not in read_all(conn)
            conn.close()
        proxy.start()
        assert call(proxy.port) == (200, JSON)
        proxy.end()
        rows = proxy.dispatched()
        assert len(rows) == len({row["id"] for row in rows}) == len(upstream.requests) == 26
        outcomes = sorted(row["outcome"] for row in rows)
        assert outcomes == ["complete"] * 6 + ["unknown"] * 20
        lost = [row for row in rows if row["outcome"] == "unknown"]
        assert {(row["source"], row["model"], row["output_tokens"]) for row in lost} == {("estimated", MODEL, 64)}


def test_killed_again_and_again_no_row_is_lost(home):
    """SIGKILL at any moment under load, five times: at the end, rows and the upstream's own count are the same."""
    with proxied(home) as (proxy, upstream):
        for turn in range(5):
            over = threading.Event()

            def load(over: threading.Event = over) -> None:
                while not over.is_set():
                    try:
                        call(proxy.port, stream=True, timeout_s=5)
                    except (OSError, http.client.HTTPException):
                        return

            workers = [threading.Thread(target=load, daemon=True) for _ in range(4)]
            for worker in workers:
                worker.start()
            time.sleep(0.3 + turn * 0.07)
            proxy.end(signal.SIGKILL)
            over.set()
            for worker in workers:
                worker.join(10)
            proxy.start()
        proxy.end()
        rows = proxy.dispatched()
        assert len(rows) == len({row["id"] for row in rows})
        known = [row for row in rows if row["outcome"] != "unknown"]
        assert len(known) > 20
        # A call is written down before it is sent: one that was killed in between has a row and no request.
        assert len(known) <= len(upstream.requests) <= len(rows)
        assert len(rows) - len(upstream.requests) <= 5 * 4
