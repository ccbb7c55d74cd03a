"""Plain HTTP under strain: limits, slow and quiet clients, stale connections, odd orders."""

from __future__ import annotations

import asyncio

import pytest
from relay_support import LIMITS, LOCAL, LOOPBACK, OK, Upstream, answering, read_head

pytestmark = pytest.mark.kernel


def test_limits_in_size_and_number(relay, run):
    """Heads beyond the limit get 431, connections beyond theirs 503, and others are still served."""
    limits = LIMITS.__class__(head_bytes=2000, head_fields=20, connections=2)

    async def scenario():
        async with (
            Upstream(answering(OK)) as up,
            relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL, limits=limits) as r,
        ):
            line = b"GET http://a.test:%d/ HTTP/1.1\r\nConnection: close\r\n" % up.port
            for head in (b"X: " + b"y" * 3000, b"X: y\r\n" * 30):
                assert (await r.talk(line + head + b"\r\n\r\n"))[9:12] == b"431", head
            assert (await r.talk(line + b"X: " + b"y" * 5000))[9:12] == b"431"
            assert (await r.talk(line + b"X: " + b"y" * 500 + b"\r\n\r\n"))[9:12] == b"200"
            held = [await r.client() for _ in range(2)]
            await asyncio.sleep(0.05)
            assert (await r.talk(line + b"\r\n"))[9:12] == b"503"
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.05)
            assert (await r.talk(line + b"\r\n"))[9:12] == b"200"

    run(scenario())


@pytest.mark.parametrize("start", [b"", b"G", b"GET http://a.test/ HTTP/1.1\r\nX: y", b"\x05", b"\x05\x01\x00\x05\x01"])
def test_slow_heads_are_cut_off(relay, run, start):
    """A client that never finishes a head or handshake is closed after the head timeout, drip by drip or silent."""

    async def scenario():
        async with relay(allow=["a.test"], limits=LIMITS) as r:
            reader, writer = await r.client()
            writer.write(start)

            async def drip():
                while start:
                    await asyncio.sleep(0.1)
                    writer.write(b"x")

            task = asyncio.create_task(drip())
            try:
                await asyncio.wait_for(reader.read(), 3)
            except ConnectionError:
                pass
            finally:
                task.cancel()
                writer.close()

    run(scenario())


def test_quiet_streams_end_and_lively_ones_do_not(relay, run):
    """A response without a byte for the idle time is broken off; one that trickles for longer is not."""

    async def serve(reader, writer):
        head = await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0.3)
            if b"/live" in head:
                writer.write(b"1\r\nx\r\n")
        await asyncio.sleep(0 if b"/live" in head else 20)
        writer.write(b"0\r\n\r\n")

    async def scenario():
        async with (
            Upstream(serve) as up,
            relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL, limits=LIMITS) as r,
        ):
            line = b"GET http://a.test:%d/%b HTTP/1.1\r\nConnection: close\r\n\r\n"
            live, quiet = await asyncio.gather(
                r.talk(line % (up.port, b"live")), r.talk(line % (up.port, b"quiet")), return_exceptions=True
            )
            assert live.endswith(b"1\r\nx\r\n" * 5 + b"0\r\n\r\n")
            assert isinstance(quiet, ConnectionError) or not quiet.endswith(b"0\r\n\r\n")

    run(scenario())


def test_a_stale_connection_is_replaced(relay, run):
    """A server that closed a kept connection meanwhile costs the client nothing when the request has no body."""

    async def serve(reader, writer):
        await read_head(reader)
        writer.write(OK)
        await read_head(reader)  # then closes without an answer, as after an idle timeout

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            for _ in range(3):
                writer.write(b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port)
                assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
                await reader.readexactly(2)
            assert up.connections == 3
            writer.close()

    run(scenario())


def test_a_request_that_may_not_be_repeated_is_not(relay, run):
    """A POST on a connection that the server has closed is answered with 502; the server saw it at most once."""
    seen: list[bytes] = []

    async def serve(reader, writer):
        seen.append(await read_head(reader))
        writer.write(OK)
        seen.append(await read_head(reader))

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            for status in (b"200", b"502"):
                writer.write(b"POST http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port)
                assert (await read_head(reader))[9:12] == status
                if status == b"200":
                    await reader.readexactly(2)
            writer.close()

    run(scenario())
    assert len(seen) == 2


def test_a_connect_behind_another_request_waits_for_its_turn(relay, run):
    """CONNECT may be sent ahead: the response before it comes first, and its bytes reach its own server."""

    async def serve(reader, writer):
        first = await reader.readexactly(1)
        if first == b"G":
            await read_head(reader)
            await asyncio.sleep(0.05)
            writer.write(OK)
            await reader.read()
        writer.write(first + await reader.read(3))

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            get = b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port
            answer = await r.talk(get + b"CONNECT a.test:%d HTTP/1.1\r\n\r\nping" % up.port)
            assert answer.endswith(b"\r\n\r\nokHTTP/1.1 200 Connection established\r\n\r\nping")

    run(scenario())


def test_half_close_of_a_client_still_gets_the_answer(relay, run):
    """`nc`-like clients that close their direction after the request get the whole response."""

    async def serve(reader, writer):
        await read_head(reader)
        await asyncio.sleep(0.1)
        writer.write(OK)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            answer = await r.talk(b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % up.port, eof=True)
            assert answer.endswith(b"ok")

    run(scenario())


def test_not_a_proxy_request_is_explained(relay, run):
    """Origin-form, https:// in absolute form, and strange hosts get a 400 that says what to do."""

    async def scenario():
        async with relay(allow=["a.test"]) as r:
            for url in (b"/", b"https://a.test/", b"http://u@a.test/", b"http://a%2etest/", b"http://a.test:0/", b"*"):
                answer = await r.talk(b"GET " + url + b" HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 400 "), url
            assert r.resolver.asked == []

    run(scenario())
