"""HTTP/2 on both sides of TLS that ends at the broker."""

from __future__ import annotations

import asyncio

import pytest
from h2 import events
from h2_support import H2Server, H2TestClient
from relay_support import OK, Upstream, answering, terminated, until

pytestmark = pytest.mark.kernel

FAKE, REAL = "cloister-a-placeholder", "real-a-secret"


async def collected(peer, number):
    """Return the body of a request, and its trailers."""
    body, trailers = [], {}
    while True:
        event = await peer.next(number)
        if isinstance(event, events.DataReceived):
            body.append(event.data)
        elif isinstance(event, events.TrailersReceived):
            trailers = dict(event.headers)
        elif isinstance(event, events.StreamEnded | events.StreamReset) or event is None:
            return b"".join(body), trailers


async def mirror(peer, number, headers):
    """Answer with the request's body, and its headers as trailers."""
    body, _ = await collected(peer, number)
    peer.h2.send_headers(number, [(":status", "200"), ("x-seen", dict(headers).get(b"authorization", b"").decode())])
    await peer.send(number, body)
    peer.h2.send_headers(number, [("grpc-status", "0")], end_stream=True)
    peer.flush()


def test_many_streams_share_one_connection_to_the_server(relay, run, mitm):
    """Requests at the same time get their own answers, over one connection, each with the secret put in."""

    async def scenario():
        async with Upstream(H2Server(mirror), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            place = f"a.test:{up.port}"
            numbers = []
            for index in range(30):
                number = client.request("POST", place, f"/{index}", ("authorization", f"Bearer {FAKE}"), end=False)
                await client.send(number, b"%d" % index * 1000, end=True)
                numbers.append(number)
            for index, number in enumerate(numbers):
                status, headers, body, trailers = await client.response(number)
                assert (status, headers[b"x-seen"]) == (200, b"Bearer " + REAL.encode())
                assert body == b"%d" % index * 1000
                assert trailers == {b"grpc-status": b"0"}
            assert up.connections == 1
            await client.close()
            await until(lambda: len(r.events) == 30)
            assert {event.credentials for event in r.events} == {("token",)}

    run(scenario())


def test_http2_inside_and_http1_outside(relay, run, mitm):
    """A server without HTTP/2 serves a client with it, several requests at a time over a few connections."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            numbers = [client.request("GET", f"a.test:{up.port}", f"/{index}") for index in range(10)]
            assert [(await client.response(number))[2] for number in numbers] == [b"ok"] * 10
            await client.close()
            await until(lambda: len(r.events) == 10)

    run(scenario())
    assert sorted(head.split()[1] for head in seen) == sorted(b"/%d" % index for index in range(10))


def test_both_directions_stream_at_the_same_time(relay, run, mitm):
    """A call that answers while it still listens works, as gRPC does: nothing is collected or held back for long."""

    async def talk(peer, number, _headers):
        peer.h2.send_headers(number, [(":status", "200"), ("content-type", "application/grpc")])
        peer.flush()
        while True:
            event = await peer.next(number)
            if isinstance(event, events.DataReceived):
                await peer.send(number, b"re:" + event.data)
            elif isinstance(event, events.StreamEnded):
                break
        peer.h2.send_headers(number, [("grpc-status", "0")], end_stream=True)
        peer.flush()

    async def scenario():
        async with Upstream(H2Server(talk), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            number = client.request("POST", f"a.test:{up.port}", "/call", ("te", "trailers"), end=False)
            assert isinstance(await client.next(number), events.ResponseReceived)
            for index in range(5):
                await client.send(number, b"message %d" % index)
                got = b""
                while len(got) < 12:
                    got += (await client.next(number)).data
                assert got == b"re:message %d" % index
            client.h2.end_stream(number)
            client.flush()
            assert (await client.response(number))[3] == {b"grpc-status": b"0"}
            await client.close()

    run(scenario())


def test_a_large_upload_and_download_are_whole(relay, run, mitm):
    """Sixteen megabytes in each direction arrive unchanged through both flow controls."""
    data = bytes(range(256)) * 65536

    async def scenario():
        async with Upstream(H2Server(mirror), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            number = client.request("POST", f"a.test:{up.port}", "/", end=False)
            await client.send(number, data, end=True)
            status, _, body, _ = await client.response(number)
            assert status == 200
            assert body == data
            await client.close()

    run(scenario())


def test_a_reset_of_either_side_ends_the_other(relay, run, mitm):
    """A client that gives up ends the request at the server, and a server that breaks off is no complete answer."""
    gone = asyncio.Event()

    async def wait(peer, number, headers):
        if dict(headers)[b":path"] == b"/break":
            peer.h2.send_headers(number, [(":status", "200")])
            peer.h2.send_data(number, b"half")
            peer.flush()
            await asyncio.sleep(0.05)
            peer.h2.reset_stream(number, 2)
            peer.flush()
            return
        await collected(peer, number)
        while True:
            if isinstance(await peer.next(number), events.StreamReset):
                gone.set()
                return

    async def scenario():
        async with Upstream(H2Server(wait), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            number = client.request("GET", f"a.test:{up.port}", "/wait")
            await asyncio.sleep(0.3)
            client.h2.reset_stream(number, 8)
            client.flush()
            await asyncio.wait_for(gone.wait(), 5)
            number = client.request("GET", f"a.test:{up.port}", "/break")
            assert (await client.response(number))[0] == -1
            await client.close()
            assert sorted(event.reason for event in r.events) == ["bad-gateway", "client-closed"]

    run(scenario())


def test_a_client_that_says_goodbye_gets_its_answers(relay, run, mitm):
    """After the client's GOAWAY the requests under way are still answered, and then the connection ends."""

    async def slowly(peer, number, headers):
        await asyncio.sleep(0.2)
        await mirror(peer, number, headers)

    async def scenario():
        async with Upstream(H2Server(slowly), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            number = client.request("POST", f"a.test:{up.port}", "/", end=False)
            await client.send(number, b"hello", end=True)
            client.writer.write(b"\0\0\x08\x07\0\0\0\0\0" + bytes(8))
            assert (await client.response(number))[::2] == (200, b"hello")
            await asyncio.wait_for(client.closed.wait(), 5)
            await client.close()

    run(scenario())


def test_a_client_may_drop_streams_among_others(relay, run, mitm):
    """Hundreds of dropped streams among as many that were served are ordinary use, not a flood."""

    async def serve(peer, number, headers):
        if dict(headers)[b":path"] == b"/quick":
            await mirror(peer, number, headers)

    async def scenario():
        async with Upstream(H2Server(serve), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            for _ in range(400):
                client.h2.reset_stream(client.request("GET", f"a.test:{up.port}", "/slow"), 8)
                assert (await client.response(client.request("GET", f"a.test:{up.port}", "/quick")))[0] == 200
            await client.close()

    run(scenario())


def test_many_servers_of_a_client_end_with_it(relay, run, mitm):
    """When the client leaves, every stream and connection to the server ends, and each request is on record."""
    left = asyncio.Event()

    async def wait(peer, _number, _headers):
        await peer.closed.wait()
        left.set()

    async def scenario():
        async with Upstream(H2Server(wait), mitm.server("a.test", "h2")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
            for _ in range(20):
                client.request("GET", f"a.test:{up.port}", "/")
            await until(lambda: len(r.server.open_forwards) == 20)
            client.writer.transport.abort()
            await asyncio.wait_for(left.wait(), 5)
            await until(lambda: len(r.events) == 20)
            assert {event.reason for event in r.events} == {"client-closed"}

    run(scenario())
