"""Attacks on TLS that ends at the broker, from inside the sandbox and from the server's side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time

import pytest
from h2_support import H2TestClient
from relay_support import (
    LIMITS,
    OK,
    Upstream,
    answering,
    connect,
    ended,
    get,
    read_head,
    socks,
    terminated,
    tunnel_tls,
    until,
)

from cloister.egress.rules import compile_ruleset
from cloister.policy.model import Egress, EgressRule

pytestmark = pytest.mark.kernel

FAKE, REAL = "cloister-a-placeholder", "real-a-secret"


async def answer(reader):
    """Return status and JSON reason of an answer."""
    head = await read_head(reader)
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    return int(head.split()[1]), json.loads(body)["reason"] if body.startswith(b"{") else ""


# The client's TLS.


@pytest.mark.parametrize("port", [443, 8080])
def test_a_client_without_tls_is_cut(relay, run, mitm, port):
    """Bytes that are no TLS go nowhere, whatever the port: a secret is never put in on an open wire."""

    async def scenario():
        async with terminated(relay, mitm, port) as r:
            got = await r.talk(connect("a.test", port) + get(port))
            assert got == b"HTTP/1.1 200 Connection established\r\n\r\n"
            await until(lambda: r.events)
            assert [(event.verdict, event.reason) for event in r.events] == [("deny", "not-tls")]
            assert r.resolver.asked == []

    run(scenario())


@pytest.mark.parametrize(
    ("name", "reason"), [("b.test", "sni-mismatch"), (None, "sni-missing")], ids=["other-name", "no-name"]
)
def test_the_hello_must_ask_for_the_host(relay, run, mitm, name, reason):
    """TLS with another server name, or none, is cut with an alert before a certificate is shown."""

    async def scenario():
        context = mitm.client()
        context.check_hostname = False
        async with terminated(relay, mitm, 443) as r:
            reader, writer = await r.client()
            writer.write(connect("a.test", 443))
            await read_head(reader)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await writer.start_tls(context, server_hostname=name or "127.0.0.1")
            await until(lambda: r.events)
            assert [(event.verdict, event.reason) for event in r.events] == [("deny", reason)]

    run(scenario())


def test_old_tls_is_refused(relay, run, mitm):
    """TLS 1.1 gets no session, and the failure is on record; TLS 1.2 and 1.3 do."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            for version, works in (("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)):
                context = mitm.client()
                context.set_ciphers("DEFAULT:@SECLEVEL=0")
                context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
                if not works:
                    with pytest.raises((ssl.SSLError, ConnectionError)):
                        await tunnel_tls(r, "a.test", up.port, context)
                    continue
                reader, writer = await tunnel_tls(r, "a.test", up.port, context)
                assert writer.get_extra_info("ssl_object").version() == version.replace("_", ".")
                writer.write(get(up.port))
                assert await answer(reader) == (200, "")
                writer.close()
            await until(lambda: len(r.events) == 3)
            assert r.events[0].reason == "tls-failed"

    run(scenario())


def test_a_client_that_does_not_trust_us_gets_nothing(relay, run, mitm):
    """A client with its own idea of the certificate (pinning) fails in its handshake; no request is ever made."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await tunnel_tls(r, "a.test", up.port, mitm.trust(False))
            await until(lambda: r.events)
            assert (r.events[0].protocol, r.events[0].reason) == ("connect", "tls-failed")
            assert up.connections == 0

    run(scenario())


@pytest.mark.parametrize("split", [1, 7, 100, 5000])
def test_a_hello_sent_ahead_is_not_lost(relay, run, mitm, split):
    """A client that sends its hello with CONNECT or SOCKS, in pieces of any size, gets its session all the same."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            for first, size in ((connect("a.test", up.port), 39), (socks("a.test", up.port), 12)):
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = mitm.client().wrap_bio(incoming, outgoing, server_hostname="a.test")
                with pytest.raises(ssl.SSLWantReadError):
                    tls.do_handshake()
                reader, writer = await r.client()
                hello = outgoing.read()
                writer.write(first + hello[:split])
                await asyncio.sleep(0.02)
                writer.write(hello[split:])
                await reader.readexactly(size)
                while True:
                    try:
                        tls.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        incoming.write(await asyncio.wait_for(reader.read(65536), 5))
                tls.write(get(up.port))
                writer.write(outgoing.read())
                got = b""
                while b"ok" not in got:
                    incoming.write(await asyncio.wait_for(reader.read(65536), 5))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        while True:
                            got += tls.read(65536)
                assert got.startswith(b"HTTP/1.1 200")
                writer.close()

    run(scenario())


def test_a_request_that_tls_cut_off_is_not_passed_on(relay, run, mitm):
    """A client that goes in the middle of a body leaves no complete request at the server."""
    complete = []

    async def serve(reader, writer):
        await read_head(reader)
        try:
            complete.append(await reader.readexactly(100))
        except asyncio.IncompleteReadError:
            complete.append(None)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            _, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            writer.write(f"PUT / HTTP/1.1\r\nHost: a.test:{up.port}\r\nContent-Length: 100\r\n\r\nhalf".encode())
            await asyncio.sleep(0.2)
            writer.transport.abort()
            await until(lambda: r.events)
            await until(lambda: complete)
            assert complete == [None]
            assert r.events[0].reason == "client-closed"

    run(scenario())


def test_idle_connections_and_slow_handshakes_end(relay, run, mitm):
    """A hello that never ends, a handshake that never goes on, and a kept connection nobody uses are closed in time."""

    async def scenario():
        async with terminated(relay, mitm, 443, limits=LIMITS) as r:
            for sent in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):
                reader, writer = await r.client()
                writer.write(connect("a.test", 443) + sent)
                await read_head(reader)
                await ended(reader)
                writer.close()
            for alpn in ("http/1.1", "h2"):
                reader, writer = await tunnel_tls(r, "a.test", 443, mitm.client(alpn))
                await ended(reader)
                writer.close()
            await until(lambda: len(r.events) == 4)
            assert [event.reason for event in r.events[:2]] == ["request-timeout"] * 2

    run(scenario())


# The server's TLS.


@pytest.mark.parametrize("fault", ["other-name", "expired", "not-yet", "unknown-authority", "no-tls"])
@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
def test_a_server_that_cannot_prove_itself_gets_no_secret(relay, run, mitm, fault, alpn):
    """Wrong name, expired, not yet valid, unknown authority, no TLS: 502 with the reason, and no byte of a request."""
    seen = bytearray()

    async def serve(reader, writer):
        while data := await reader.read(65536):
            seen.extend(data)
            writer.write(b"220 hello\r\n")

    async def scenario():
        clock = {"expired": time.time() - 20 * 86400, "not-yet": time.time() + 20 * 86400}.get(fault)
        tls = mitm.server("b.test" if fault == "other-name" else "a.test", clock=clock)
        if fault == "unknown-authority":
            tls = mitm.authority.context("a.test")
        async with Upstream(serve, None if fault == "no-tls" else tls) as up, terminated(relay, mitm, up.port) as r:
            wanted = "tls-failed" if fault == "no-tls" else "certificate-invalid"
            if alpn == "h2":
                client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"))
                number = client.request("GET", f"a.test:{up.port}", "/", ("authorization", FAKE))
                status, _, body, _ = await client.response(number)
                assert (status, json.loads(body)["reason"]) == (502, wanted)
                await client.close()
            else:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                writer.write(get(up.port))
                assert await answer(reader) == (502, wanted)
                writer.close()
            assert r.events[0].reason == wanted

    run(scenario())
    assert REAL.encode() not in seen
    assert b"GET" not in seen


def test_an_answer_that_tls_cut_off_is_not_complete(relay, run, mitm):
    """A body that ends with the connection is complete only after close_notify; a cut is passed on as a cut."""

    async def serve(reader, writer):
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf of it")
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            writer.write(get(up.port))
            await read_head(reader)
            got = b""
            try:
                while data := await asyncio.wait_for(reader.read(65536), 5):
                    got += data
            except (ConnectionError, ssl.SSLError):
                pass
            assert b"0\r\n\r\n" not in got
            writer.close()
            await until(lambda: r.events)
            assert r.events[0].reason == "bad-gateway"

    run(scenario())


def test_a_redirect_takes_no_secret_along(relay, run, mitm):
    """A server that sends the client to another host: the placeholder it takes there is refused."""
    there = b"HTTP/1.1 302 Found\r\nLocation: https://b.test/\r\nContent-Length: 0\r\n\r\n"

    async def scenario():
        async with Upstream(answering(there), mitm.server("a.test")) as up:
            broker = mitm.broker(a=("a.test", up.port), b=("b.test", up.port))
            async with terminated(relay, mitm, up.port, broker=broker, allow=[f"*.test:{up.port}"]) as r:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                writer.write(get(up.port))
                assert (await read_head(reader)).startswith(b"HTTP/1.1 302")
                writer.close()
                reader, writer = await tunnel_tls(r, "b.test", up.port, mitm.client())
                writer.write(get(up.port).replace(b"a.test", b"b.test"))
                assert await answer(reader) == (403, "placeholder-misdirected")
                writer.close()

    run(scenario())


# Requests.


@pytest.mark.parametrize(
    ("request_of", "reason"),
    [
        (lambda _: b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n", "host-mismatch"),
        (lambda p: f"GET https://b.test/ HTTP/1.1\r\nHost: a.test:{p}\r\n\r\n".encode(), "host-mismatch"),
        (lambda p: f"GET http://a.test:{p}/ HTTP/1.1\r\nHost: a.test:{p}\r\n\r\n".encode(), "bad-request"),
        (lambda p: f"GET / HTTP/1.1\r\nHost: a.test:{p}\r\nHost: b.test\r\n\r\n".encode(), "bad-request"),
        (lambda _: b"GET / HTTP/1.1\r\n\r\n", "bad-request"),
        (lambda p: f"CONNECT b.test:443 HTTP/1.1\r\nHost: a.test:{p}\r\n\r\n".encode(), "bad-request"),
        (lambda p: get(p, "/", "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n", "bad-request"),
        (lambda p: get(p, "/", "Content-Length: 4", "Content-Length: 5") + b"abcd", "bad-request"),
        (lambda p: get(p, "/", "X: a\r\n folded"), "bad-request"),
        (lambda p: get(p, "/", "X: a\rb"), "bad-request"),
        (lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "bad-request"),
    ],
)  # fmt: skip
def test_fronting_and_smuggling_over_http1_are_refused(relay, run, mitm, request_of, reason):
    """Requests for another host than the connection's, or that two readers could read differently, go nowhere."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            writer.write(request_of(up.port))
            assert (await answer(reader))[1] == reason
            writer.close()
            await until(lambda: r.events)
            assert (r.events[0].verdict, r.events[0].host) == ("deny", "a.test")
            assert up.connections == 0

    run(scenario())


@pytest.mark.parametrize(
    "fields",
    [
        [(":authority", "b.test")],
        [(":authority", "a.test"), ("host", "b.test")],
        [("connection", "close")],
        [("transfer-encoding", "chunked")],
        [("upgrade", "h2c")],
        [("X-Upper", "1")],
        [("x", "a\r\nInjected: 1")],
        [("x", "a\x00b")],
        [(":path", "/a b")],
        [(":path", "/a\r\nX: 1")],
        [(":path", "")],
        [(":path", "http://b.test/")],
        [(":method", "GET / HTTP/1.1\r\nX: ")],
        [(":method", "CONNECT")],
        [(":scheme", "http")],
        [(":protocol", "websocket")],
        [(":path", "/1"), (":path", "/2")],
        [("content-length", "5")],
        [("content-length", "1, 2")],
        [("te", "gzip")],
        [("proxy-connection", "keep-alive")],
    ],
    ids=str,
)
def test_fronting_and_smuggling_over_http2_are_refused(relay, run, mitm, fields):
    """Heads of HTTP/2 that would become something else as HTTP/1.1 are refused; the server sees nothing of them."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            client = await H2TestClient.open(r, "a.test", up.port, mitm.client("h2"), strict=False)
            head = {":method": "GET", ":scheme": "https", ":authority": f"a.test:{up.port}", ":path": "/"}
            given = [name for name, _ in fields]
            own = [(name, value) for name, value in head.items() if name not in given]
            pseudo = [field for field in fields if field[0].startswith(":")]
            client.h2.config.validate_inbound_headers = False
            number = client.h2.get_next_available_stream_id()
            sent = own + pseudo + [field for field in fields if not field[0].startswith(":")]
            client.h2.send_headers(number, sent, end_stream=True)
            client.flush()
            status = (await client.response(number))[0]
            assert status in {-1, 400, 403, 421}, status
            await client.close()

    run(scenario())
    assert seen == []


def test_a_kept_connection_obeys_new_rules(relay, run, mitm):
    """After a policy reload the next request of a kept connection is refused, and one under way is broken off."""

    async def serve(reader, writer):
        while True:
            head = await read_head(reader)
            if b"/slow" in head:
                await asyncio.sleep(10)
            writer.write(OK)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            first, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            slow, slow_writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
            writer.write(get(up.port))
            assert await answer(first) == (200, "")
            slow_writer.write(get(up.port, "/slow"))
            await until(lambda: r.server.open_forwards)
            rule = EgressRule(host="a.test", port=up.port, methods=("POST",))
            r.server.update(compile_ruleset(Egress(allow=(rule,)), agent="claude"))
            writer.write(get(up.port))
            assert await answer(first) == (403, "method-not-allowed")
            assert await answer(slow) == (403, "method-not-allowed")
            writer.close()
            slow_writer.close()

    run(scenario())


def test_half_close_still_gets_its_answer(relay, run, mitm):
    """A client that ends its direction after the request gets the answer: close_notify ends one direction."""

    async def serve(reader, writer):
        await read_head(reader)
        await asyncio.sleep(0.2)
        writer.write(OK)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            reader, writer = await r.client()
            writer.write(connect("a.test", up.port))
            await read_head(reader)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = mitm.client().wrap_bio(incoming, outgoing, server_hostname="a.test")
            got, asked = b"", False
            while b"ok" not in got:
                try:
                    if not asked:
                        tls.do_handshake()
                        tls.write(get(up.port))
                        asked = True
                        with pytest.raises(ssl.SSLWantReadError):
                            tls.unwrap()
                    got += tls.read(65536)
                except ssl.SSLWantReadError:
                    writer.write(outgoing.read())
                    data = await asyncio.wait_for(reader.read(65536), 5)
                    assert data
                    incoming.write(data)
            assert got.startswith(b"HTTP/1.1 200")
            writer.close()

    run(scenario())
