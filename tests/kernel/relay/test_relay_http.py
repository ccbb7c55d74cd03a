"""Plain HTTP through the relay, against servers on loopback."""

from __future__ import annotations

import asyncio
import json

import pytest
from relay_support import LOCAL, LOOPBACK, OK, Upstream, answering, bridge, curl, read_head, until

pytestmark = pytest.mark.kernel


def test_curl_gets_an_allowed_page_and_a_readable_refusal(relay, run):
    """The real curl reaches an allowed host, and learns from the 403 of another one why and what would allow it."""

    async def scenario():
        async with Upstream(answering(OK)) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            await bridge(r, lambda proxy: curl_both(proxy, up.port))
            assert [event.verdict for event in r.events] == ["allow", "deny"]

    async def curl_both(proxy, port):
        good = await curl("-x", proxy, f"http://a.test:{port}/")
        assert (good.returncode, good.stdout) == (0, b"ok")
        bad = await curl("-x", proxy, "-D", "-", "http://b.test/")
        head, body = bad.stdout.split(b"\r\n\r\n", 1)
        assert b" 403 " in head
        assert b"x-cloister-reason: not-in-allowlist" in head
        assert json.loads(body)["remedy"] == 'add "b.test:80" to allow in [agents.claude.egress]'

    run(scenario())


def test_each_request_of_a_kept_connection_is_decided_anew(relay, run):
    """A connection that was good for one host is no ticket to another; going back still works."""
    seen: list[bytes] = []

    async def scenario():
        serve = answering(OK, seen)
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            statuses = []
            for host in (f"a.test:{up.port}", f"b.test:{up.port}", f"a.test:{up.port}"):
                writer.write(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                head = await read_head(reader)
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                statuses.append(int(head.split()[1]))
            assert statuses == [200, 403, 200]
            assert up.connections == 1
            assert r.resolver.asked == ["a.test"]
            writer.close()

    run(scenario())
    assert len(seen) == 2


def test_pipelined_requests_are_answered_in_order(relay, run):
    """Requests sent ahead are served one by one, and a denied one in the middle does not disturb the others."""

    async def scenario():
        async with Upstream(answering(OK)) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            good = b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port
            last = good.replace(b"Host: a", b"Connection: close")
            answer = await r.talk(good + b"GET http://b.test/ HTTP/1.1\r\nHost: b\r\n\r\n" + last)
            assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"403", b"200"]

    run(scenario())


def test_the_host_field_is_the_target(relay, run):
    """The server hears the host that was decided about, whatever Host field, credential or hop the client adds."""
    seen: list[bytes] = []

    async def scenario():
        serve = answering(OK, seen)
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            await r.talk(
                b"GET http://A.TEST.:%d/p?q HTTP/1.1\r\nHost: evil.test\r\nProxy-Authorization: secret\r\n"
                b"Connection: close, X-Hop\r\nX-Hop: 1\r\nX-Kept: \xc3\xa4 b\r\n"
                b"Upgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n" % up.port
            )
            expected = b"GET /p?q HTTP/1.1\r\nHost: a.test:%d\r\nX-Kept: \xc3\xa4 b\r\n\r\n" % up.port
            assert seen == [expected]

    run(scenario())


SMUGGLING = {
    "two lengths": b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc",
    "length list": b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": b"Content-Length: +3\r\n\r\nabc",
    "length and chunked": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "tab coding": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "space before colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "folded field": b"X: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare newline": b"X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare return": b"X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "NUL": b"X: a\0b\r\n\r\n",
    "two hosts": b"Host: other.test\r\n\r\n",
    "upgrade with a body": b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 3\r\n\r\nabc",
    "bad chunk size": b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
    "chunk size too large": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "chunk without its end": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcXX0\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_ambiguous_requests_do_not_reach_the_server_as_two(relay, run, name):
    """A request that readers could cut differently is refused, and the raw server never sees a second one in it."""
    seen = bytearray()

    async def serve(reader, writer):
        while data := await reader.read(65536):
            seen.extend(data)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            head = b"POST http://a.test:%d/ HTTP/1.1\r\nHost: a.test\r\n" % up.port
            answer = await r.talk(head + SMUGGLING[name] + b"GET /smuggled HTTP/1.1\r\n\r\n")
            assert not answer or answer.startswith(b"HTTP/1.1 400 "), answer

    run(scenario())
    assert b"smuggled" not in seen
    assert seen.count(b"HTTP/1.1") <= 1


def test_unambiguous_bodies_arrive(relay, run):
    """The positive twin: counted and chunked bodies arrive whole, with one framing, and trailers are kept."""
    seen: list[bytes] = []

    async def serve(reader, writer):
        seen.append(await read_head(reader))
        body = await (reader.readexactly(3) if b"Length" in seen[-1] else reader.readuntil(b"X-T: v\r\n\r\n"))
        seen.append(body)
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-R: w\r\nSet-Cookie: a\r\n\r\n"
        )

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            head = b"POST http://a.test:%d/ HTTP/1.1\r\nConnection: close\r\n" % up.port
            answer = await r.talk(head + b"Content-Length: 3\r\n\r\nabc")
            assert answer.endswith(b"\r\n\r\n2\r\nhi\r\n0\r\nX-R: w\r\n\r\n")
            chunked = b"Transfer-Encoding: chunked\r\n\r\n1;x=y\r\na\r\n2\r\nbc\r\n0\r\nX-T: v\r\nHost: evil\r\n\r\n"
            assert b"200 OK" in await r.talk(head + chunked)

    run(scenario())
    assert seen[1] == b"abc"
    assert seen[2].count(b"Transfer-Encoding: chunked\r\n") == 1
    assert seen[3] == b"1\r\na\r\n2\r\nbc\r\n0\r\nX-T: v\r\n\r\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", (200, b"d\r\nuntil the end\r\n0\r\n\r\n")),
        (b"HTTP/1.1 204 Gone\r\nX: 1\r\n\r\n", (204, b"")),
        (b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", (304, b"")),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", (200, b"x")),
        (b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n" + OK, (103, b"")),
    ],
)
def test_responses_of_every_shape(relay, run, response, expected):
    """A body up to the end of the connection, none at all, HTTP/1.0, and interim responses reach the client."""

    async def serve(reader, writer):
        await read_head(reader)
        writer.write(response)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            answer = await r.talk(b"GET http://a.test:%d/ HTTP/1.1\r\nConnection: close\r\n\r\n" % up.port)
            status, body = expected
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert answer.endswith(b"\r\n\r\nok" if status == 103 else b"\r\n\r\n" + body)

    run(scenario())


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\nraw",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 " + b"y" * 600_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_200_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"y" * 1_200_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 60_000,
        b"",
    ],
)
def test_a_broken_answer_is_never_complete(relay, run, response):
    """A response that breaks off, contradicts itself or is none ends in a 502 or in an incomplete body."""

    async def serve(reader, writer):
        await read_head(reader)
        writer.write(response)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            answer = await r.talk(b"GET http://a.test:%d/ HTTP/1.1\r\nConnection: close\r\n\r\n" % up.port)
            if answer.startswith(b"HTTP/1.1 200"):
                assert not answer.endswith(b"0\r\n\r\n")
                assert not answer.endswith(b"a" * 10)
            else:
                assert answer.startswith(b"HTTP/1.1 502 ") or not answer
            assert r.events[-1].reason == "bad-gateway"

    run(scenario())


@pytest.mark.parametrize("start", [b"", b"Transfer-Encoding: chunked\r\n\r\n0\r\n"])
def test_a_field_that_never_ends_is_cut_off(relay, run, start):
    """A server that sends one endless header or trailer field is cut off early; it cannot fill the broker's memory."""
    sent = 0

    async def serve(reader, writer):
        nonlocal sent
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + start + b"X: ")
        while sent < 64 << 20:
            writer.write(b"y" * 65536)
            await writer.drain()
            sent += 65536

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            await r.talk(b"GET http://a.test:%d/ HTTP/1.1\r\nConnection: close\r\n\r\n" % up.port)
            await until(lambda: r.events[-1].reason == "bad-gateway")
        assert sent < 16 << 20

    run(scenario())


def test_head_keeps_the_length_and_the_connection(relay, run):
    """A HEAD response tells the length of a body that does not come, and the connection stays usable."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"

    async def scenario():
        async with Upstream(answering(head)) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            for _ in range(2):
                writer.write(b"HEAD http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port)
                assert b"Content-Length: 100" in await read_head(reader)
            assert up.connections == 1
            writer.close()

    run(scenario())


def test_server_sent_events_arrive_as_they_are_sent(relay, run):
    """Each event reaches the client before the next one is sent, byte for byte."""
    gates = [asyncio.Event() for _ in range(3)]

    async def serve(reader, writer):
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number, gate in enumerate(gates):
            data = b"data: {%d}\r\n\n" % number
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await asyncio.wait_for(gate.wait(), 5)
        writer.write(b"0\r\n\r\n")

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            writer.write(b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port)
            await read_head(reader)
            for number, gate in enumerate(gates):
                data = b"data: {%d}\r\n\n" % number
                assert await reader.readexactly(len(data) + 5) == b"%x\r\n%b\r\n" % (len(data), data)
                gate.set()
            assert await reader.readexactly(5) == b"0\r\n\r\n"
            writer.close()

    run(scenario())


def test_continue_is_passed_both_ways(relay, run):
    """A client that waits for 100-continue gets the server's, then sends its body."""

    async def serve(reader, writer):
        assert b"Expect: 100-continue" in await read_head(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(4) == b"body"
        writer.write(OK)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            writer.write(
                b"POST http://a.test:%d/ HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n" % up.port
            )
            assert (await read_head(reader)).startswith(b"HTTP/1.1 100 ")
            writer.write(b"body")
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(scenario())


def test_a_refusal_comes_before_the_body(relay, run):
    """A denied upload is answered at once, and the answer survives a client that keeps sending."""

    async def scenario():
        async with relay(allow=[], **LOOPBACK) as r:
            reader, writer = await r.client()
            writer.write(b"POST http://b.test/ HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 300_000)
            assert (await read_head(reader)).startswith(b"HTTP/1.1 403 ")
            writer.close()
            assert r.resolver.asked == []

    run(scenario())


def test_websocket_is_a_tunnel_after_the_handshake(relay, run):
    """A WebSocket handshake is passed on, and frames then go both ways; a refused one leaves HTTP intact."""

    async def serve(reader, writer):
        head = await read_head(reader)
        if b"/no" in head:
            writer.write(OK)
            await read_head(reader)
            writer.write(OK)
            return
        assert b"Upgrade: websocket" in head
        assert b"Sec-WebSocket-Key: k" in head
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX: y\r\n\r\nfirst"
        )
        while data := await reader.read(100):
            writer.write(data)
        writer.write_eof()

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            line = b"GET http://a.test:%d/%b HTTP/1.1\r\nHost: a\r\n"
            fields = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
            answer = await r.talk(line % (up.port, b"") + fields + b"frame", eof=True)
            assert answer.startswith(b"HTTP/1.1 101 ")
            assert answer.endswith(b"\r\n\r\nfirstframe")
            second = line % (up.port, b"no") + b"Connection: close\r\n\r\n"
            assert (await r.talk(line % (up.port, b"no") + fields + second)).count(b"200 OK") == 2
            assert [event.status for event in r.events] == [101, 200, 200]

    run(scenario())
