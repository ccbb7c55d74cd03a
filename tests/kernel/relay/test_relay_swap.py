"""What leaves for the servers: secrets where they belong, placeholders nowhere, masks on the way back."""

from __future__ import annotations

import asyncio
import json

import pytest
from relay_support import LOCAL, LOOPBACK, OK, Upstream, answering, read_head, tunnel_tls, until

from cloister.egress.hosts import parse_host
from cloister.egress.http1 import Body, RequestLine
from cloister.relay.lanes import Outgoing
from cloister.relay.session import Swap

pytestmark = pytest.mark.kernel

FAKE, REAL = "cloister-a-placeholder", "real-a-secret"


def two_hosts(relay, mitm, port, **more):
    """Make a relay with credentials for a.test and b.test, both served on one port; plain.test has none."""
    table = {**LOCAL, "plain.test": ["127.0.0.1"]}
    options = {"allow": [f"*.test:{port}"], **LOOPBACK, "table": table, "trust": mitm.trust}
    return relay(**{**options, "broker": mitm.broker(a=("a.test", port), b=("b.test", port)), **more})


async def exchange(r, port, context, request):
    """Send a request over TLS and return status, head and body of the answer."""
    reader, writer = await tunnel_tls(r, request[0], port, context)
    for piece in request[1:]:
        writer.write(piece)
        await asyncio.sleep(0.02)
    try:
        head = await read_head(reader)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), head, await reader.readexactly(length)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "request_of",
    [
        lambda host: [f"GET /?k={FAKE} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()],
        lambda host: [f"GET / HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {FAKE}\r\n\r\n".encode()],
        lambda host: [f"GET / HTTP/1.1\r\nHost: {host}\r\nX-{FAKE}: 1\r\n\r\n".encode()],
        lambda host: [f'POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 26\r\n\r\n{{"{FAKE}"}}'.encode()],
        lambda host: [
            f"POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\na\r\n{FAKE[:10]}\r\n".encode(),
            f"c\r\n{FAKE[10:]}\r\n0\r\n\r\n".encode(),
        ],
        lambda host: [
            f"POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n".encode(),
            f"0\r\nX-Sum: {FAKE}\r\n\r\n".encode(),
        ],
        lambda host: [
            f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Protocol: {FAKE}\r\n\r\n".encode()
        ],
    ],
    ids=["query", "header", "header-name", "body", "split-body", "trailer", "websocket"],
)  # fmt: skip
@pytest.mark.parametrize("plain", [False, True], ids=["tls", "plain"])
def test_a_placeholder_reaches_no_other_host(relay, run, mitm, request_of, plain):
    """The placeholder of one host, sent to another in any part of a request, is refused, recorded and stays here."""
    seen = bytearray()

    async def serve(reader, writer):
        while data := await reader.read(65536):
            seen.extend(data)
            if b"POST" not in seen:
                writer.write(OK)

    async def scenario():
        tls = None if plain else mitm.server("b.test")
        async with Upstream(serve, tls) as up, two_hosts(relay, mitm, up.port) as r:
            host = f"{'plain' if plain else 'b'}.test:{up.port}"
            pieces = request_of(host)
            if plain:
                pieces[0] = pieces[0].replace(b" /", f" http://{host}/".encode(), 1)
                reader, writer = await r.client()
                for piece in pieces:
                    writer.write(piece)
                    await asyncio.sleep(0.02)
                head = await read_head(reader)
                writer.close()
            else:
                _, head, body = await exchange(r, up.port, mitm.client(), ["b.test", *pieces])
                assert json.loads(body)["reason"] == "placeholder-misdirected"
            assert b" 403 " in head.split(b"\r\n")[0]
            assert b"x-cloister-reason: placeholder-misdirected" in head
            await until(lambda: r.events)
            assert (r.events[0].verdict, r.events[0].reason) == ("deny", "placeholder-misdirected")
            assert FAKE not in repr(r.events)

    run(scenario())
    assert FAKE.encode() not in seen.replace(b"\r\n", b"")
    assert b"placeholder" not in seen


def test_a_body_without_placeholders_passes_whole(relay, run, mitm):
    """The positive twin: a body in pieces of any size arrives as it was sent, with the secret in the header."""
    seen = bytearray()

    async def serve(reader, writer):
        head = await read_head(reader)
        seen.extend(head)
        seen.extend(await reader.readexactly(300_000))
        writer.write(OK)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            head = f"PUT / HTTP/1.1\r\nHost: a.test:{up.port}\r\nContent-Length: 300000\r\nX-Key: {FAKE}\r\n\r\n"
            pieces = [head.encode(), b"cloister-a-", b"y" * 10, b"z" * 299_979]
            assert (await exchange(r, up.port, mitm.client(), ["a.test", *pieces]))[0] == 200

    run(scenario())
    head, body = bytes(seen).split(b"\r\n\r\n", 1)
    assert b"X-Key: real-a-secret" in head
    assert body == b"cloister-a-" + b"y" * 10 + b"z" * 299_979


@pytest.mark.parametrize("framing", ["length", "chunked", "collected"])
def test_its_own_host_may_see_a_placeholder_in_a_body(relay, run, mitm, framing):
    """The twin: what an agent printed goes on to the host it is bound to, unswapped, however the body is sent."""
    seen = []

    async def serve(reader, writer):
        head = await read_head(reader)
        count = len(FAKE) + 20
        if b"chunked" in head.lower():
            while (line := await reader.readline()) != b"0\r\n":
                seen.append(await reader.readexactly(int(line, 16)))
                await reader.readline()
        else:
            seen.append(await reader.readexactly(count))
        writer.write(OK)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            r.session.broker.body_limit = 1000 if framing == "collected" else 0
            start = f"POST / HTTP/1.1\r\nHost: a.test:{up.port}\r\nX-Key: {FAKE}\r\n"
            if framing == "chunked":
                pieces = [f"{start}Transfer-Encoding: chunked\r\n\r\n".encode(), f"14\r\n{'x' * 20}\r\n".encode()]
                pieces += [f"1\r\n{letter}\r\n".encode() for letter in FAKE] + [b"0\r\n\r\n"]
            else:
                head = f"{start}Content-Length: {len(FAKE) + 20}\r\n\r\n{'x' * 20}{FAKE[:9]}"
                pieces = [head.encode(), FAKE[9:].encode()]
            assert (await exchange(r, up.port, mitm.client(), ["a.test", *pieces]))[0] == 200
            await until(lambda: r.events)
            assert (r.events[0].verdict, r.events[0].credentials) == ("allow", ("token",))

    run(scenario())
    assert b"".join(seen) == b"x" * 20 + FAKE.encode()


def test_echoed_secrets_are_masked(relay, run, mitm):
    """Where masks are set, secrets in head and body of an answer become stars, across pieces, lengths unchanged."""
    asked = []

    async def serve(reader, writer):
        asked.append(await read_head(reader))
        writer.write(f"HTTP/1.1 200 OK\r\nX-Echo: <{REAL}>\r\nContent-Length: 30\r\n\r\n--{REAL[:5]}".encode())
        await asyncio.sleep(0.05)
        writer.write(f"{REAL[5:]}-{REAL}-".encode())

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            r.session.broker.masks = (REAL.encode(),)
            head = f"GET / HTTP/1.1\r\nHost: a.test:{up.port}\r\nAccept-Encoding: gzip\r\nX-Key: {FAKE}\r\n\r\n"
            _, head, body = await exchange(r, up.port, mitm.client(), ["a.test", head.encode()])
            stars = b"*" * len(REAL)
            assert b"X-Echo: <" + stars + b">\r\n" in head
            assert body == b"--" + stars + b"-" + stars + b"-"

    run(scenario())
    assert b"accept-encoding: identity\r\n" in asked[0].lower()
    assert b"gzip" not in asked[0]


def test_a_compressed_answer_cannot_be_masked_and_is_refused(relay, run, mitm):
    """A server that compresses although it was asked not to gets through nothing where masks are set."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"

    async def scenario():
        async with Upstream(answering(answer), mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            head = f"GET / HTTP/1.1\r\nHost: a.test:{up.port}\r\n\r\n".encode()
            assert (await exchange(r, up.port, mitm.client(), ["a.test", head]))[2] == b"abcd"
            r.session.broker.masks = (REAL.encode(),)
            status, _, body = await exchange(r, up.port, mitm.client(), ["a.test", head])
            assert (status, json.loads(body)["reason"]) == (502, "answer-coded")

    run(scenario())


def test_a_body_that_is_signed_is_collected_up_to_a_bound(relay, run, mitm):
    """A broker that has to see the body gets all of it, then it is sent; a longer one is refused with 413."""
    seen: list[bytes] = []

    async def serve(reader, writer):
        head = await read_head(reader)
        assert b"expect" not in head.lower()
        seen.append(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))
        writer.write(OK)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            broker, place = r.session.broker, f"a.test:{up.port}"
            broker.body_limit = 20
            chunked = f"PUT / HTTP/1.1\r\nHost: {place}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            request = ["a.test", chunked, b"5\r\nhello\r\n", b"6\r\n world\r\n0\r\n\r\n"]
            assert (await exchange(r, up.port, mitm.client(), request))[0] == 200
            assert broker.bodies == [b"hello world"]
            request = ["a.test", chunked, b"15\r\n" + b"x" * 21 + b"\r\n0\r\n\r\n"]
            status, _, body = await exchange(r, up.port, mitm.client(), request)
            assert (status, json.loads(body)["reason"]) == (413, "body-too-large")
            long = f"PUT / HTTP/1.1\r\nHost: {place}\r\nContent-Length: 21\r\n\r\n".encode()
            assert (await exchange(r, up.port, mitm.client(), ["a.test", long]))[0] == 413
            reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            writer.write(
                f"PUT / HTTP/1.1\r\nHost: {place}\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            assert b" 100 " in await read_head(reader)
            writer.write(b"hi")
            assert b" 200 " in await read_head(reader)
            writer.close()

    run(scenario())
    assert seen == [b"hello world", b"hi"]


def test_what_goes_wrong_in_the_broker_shows_no_secret(relay, run, mitm):
    """An error of the broker is answered with its kind; its text, which may hold the secret, is nowhere."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            r.session.broker.error = ValueError(f"cannot use {REAL}")
            head = f"GET / HTTP/1.1\r\nHost: a.test:{up.port}\r\n\r\n".encode()
            status, head, body = await exchange(r, up.port, mitm.client(), ["a.test", head])
            assert (status, json.loads(body)["reason"]) == (502, "secret-unavailable")
            assert "ValueError" in json.loads(body)["explanation"]
            assert REAL.encode() not in head + body
            assert REAL not in repr(r.events)
            assert up.connections == 0

    run(scenario())


def test_a_websocket_carries_a_secret_in_its_handshake(relay, run, mitm):
    """The handshake of a WebSocket gets the secret; then bytes pass both ways, and the event names the credential."""
    seen = []

    async def serve(reader, writer):
        seen.append(await read_head(reader))
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, two_hosts(relay, mitm, up.port) as r:
            reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            head = f"GET /ws HTTP/1.1\r\nHost: a.test:{up.port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            writer.write(f"{head}Authorization: Bearer {FAKE}\r\n\r\nahead ".encode())
            assert b" 101 " in await read_head(reader)
            assert await reader.readexactly(5) == b"early"
            writer.write(b"x" * 2_000_000)
            got = await asyncio.wait_for(reader.readexactly(2_000_006), 10)
            assert got == b"AHEAD " + b"X" * 2_000_000
            writer.close()
            await until(lambda: r.events)
            event = r.events[0]
            assert (event.status, event.path, event.credentials) == (101, "/ws", ("token",))
            assert event.bytes_up >= 2_000_006

    run(scenario())
    assert b"Bearer real-a-secret" in seen[0]


def test_what_holds_a_secret_shows_nothing_of_it():
    """The values that carry secrets on their way out print as their names."""
    swap = Swap("/?key=s3cret", [(b"x", b"s3cret")], (b"s3cret",), ("token",))
    line = RequestLine(parse_host("a.test"), 443, swap.path, 443)
    assert repr(swap) == "Swap(...)"
    assert repr(Outgoing("GET", line, swap.headers, Body("none"))) == "Outgoing(...)"
