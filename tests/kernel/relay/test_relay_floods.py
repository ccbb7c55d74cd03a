"""Floods and slow ends, where TLS ends at the broker: what costs only work is cut off, and memory is bounded."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from h2 import events
from h2_support import H2Server, H2TestClient
from relay_support import OK, Upstream, answering, get, read_head, terminated, tunnel_tls, until

from cloister.relay.session import Limits

pytestmark = pytest.mark.kernel


def test_ten_thousand_resets_end_the_connection_early(relay, run, mitm):
    """Rapid reset (CVE-2023-44487): a few hundred streams are opened and dropped, then the connection is over."""
    opened = []

    async def never(_peer, number, _headers):
        opened.append(number)

    async def scenario():
        async with Upstream(H2Server(never), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            sent = 0
            while sent < 10_000 and not client.closed.is_set():
                for _ in range(50):
                    number = client.request("GET", f"a.test:{up.port}", "/")
                    client.h2.reset_stream(number, 8)
                    sent += 1
                client.flush()
                await asyncio.sleep(0)
            await asyncio.wait_for(client.closed.wait(), 10)
            codes = [event.error_code for event in client.events if isinstance(event, events.ConnectionTerminated)]
            assert codes == [11]
            await client.close()
            await until(lambda: r.server.stats.active == 0)
            assert len(r.events) <= 210

    run(scenario())
    assert len(opened) <= 210


@pytest.mark.parametrize("flood", ["ping", "settings", "empty-data", "priority", "continuation", "hpack"])
def test_floods_of_frames_that_cost_only_work_end_the_connection(relay, run, mitm, flood):
    """PING, SETTINGS, empty DATA, PRIORITY, endless CONTINUATION and swelling headers are cut off."""

    def frames(client):
        header = lambda length, kind, flags, number: (  # noqa: E731 - nine bytes (RFC 9113, 4.1)
            length.to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big")
        )
        if flood == "ping":
            return (header(8, 6, 0, 0) + b"x" * 8) * 10_000
        if flood == "settings":
            return header(0, 4, 0, 0) * 10_000
        if flood == "priority":
            return (header(5, 2, 0, 1) + b"\0\0\0\0\x01") * 10_000
        if flood == "continuation":
            block = b"\x00\x01a\x7f\xe0\x7d" + b"v" * 16_000
            return header(6, 1, 0, 1) + block[:6] + (header(16_000, 9, 0, 1) + block[6:]) * 100
        if flood == "hpack":
            indexed = b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 12_000
            return header(len(indexed), 1, 4, 1) + indexed
        return header(0, 0, 0, 1) * 10_000

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            if flood == "empty-data":
                client.request("POST", f"a.test:{up.port}", "/", end=False)
            client.writer.write(frames(client))
            await asyncio.wait_for(client.closed.wait(), 10)
            await client.close()
            await until(lambda: r.server.stats.active == 0)

    run(scenario())


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
def test_a_client_that_reads_nothing_stops_the_server(relay, run, mitm, alpn):
    """The server is read only as fast as the client: a few hundred kilobytes wait, never a whole download."""
    sent = 0

    async def serve(reader, writer):
        nonlocal sent
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            if alpn == "h2":
                client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
                client.acknowledge = False
                client.request("GET", f"a.test:{up.port}", "/")
            else:
                _, client = await tunnel_tls(r, "a.test", up.port, mitm.client())
                client.transport.pause_reading()
                client.write(get(up.port))
            await asyncio.sleep(0.5)
            before = sent
            await asyncio.sleep(0.3)
            assert sent == before
            assert 0 < sent < 12_000_000, sent
            await (client.close() if alpn == "h2" else asyncio.sleep(0, client.close()))

    run(scenario())


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
def test_a_server_that_reads_nothing_stops_the_client(relay, run, mitm, alpn):
    """The client is read only as fast as the server: an upload does not pile up here."""

    async def serve(reader, writer):
        reader._transport.pause_reading()
        await asyncio.sleep(10)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            sent = 0
            if alpn == "h2":
                client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
                number = client.request("PUT", f"a.test:{up.port}", "/", end=False)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.send(number, b"x" * 100_000_000), 1)
                sent = 100_000_000 - 1 - client.h2.local_flow_control_window(number)
                assert client.h2.local_flow_control_window(number) == 0
            else:
                _, client = await tunnel_tls(r, "a.test", up.port, mitm.client())
                client.write(f"PUT / HTTP/1.1\r\nHost: a.test:{up.port}\r\nContent-Length: 100000000\r\n\r\n".encode())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        while sent < 100_000_000:
                            client.write(b"x" * 100_000)
                            await client.drain()
                            sent += 100_000
                assert 0 < sent < 12_000_000, sent
            await (client.close() if alpn == "h2" else asyncio.sleep(0, client.close()))

    run(scenario())


def test_too_many_streams_and_fields_are_refused(relay, run, mitm):
    """More streams than announced end the connection; a head with too many fields is answered with 431."""

    async def serve(reader, writer):
        if b"/slow" in await read_head(reader):
            await asyncio.sleep(10)
        writer.write(OK)

    async def scenario():
        few = Limits(head_fields=20)
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port, limits=few) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            place = f"a.test:{up.port}"
            extra = [(f"x-{index}", "1") for index in range(30)]
            assert (await client.response(client.request("GET", place, "/", *extra)))[0] == 431
            assert (await client.response(client.request("GET", place, "/")))[0] == 200
            client.h2.remote_settings.max_concurrent_streams = 1000
            client.h2.remote_settings.acknowledge()
            for _ in range(150):
                client.request("GET", place, "/slow")
            await asyncio.wait_for(client.closed.wait(), 5)
            await client.close()

    run(scenario())
