"""TLS that ends at the broker, for the hosts a credential is bound to and only for those."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys

import pytest
from relay_support import (
    LOCAL,
    LOOPBACK,
    OK,
    Upstream,
    answering,
    bridge,
    connect,
    curl,
    ended,
    read_head,
    tunnel_tls,
    until,
)

from cloister.egress.rules import compile_ruleset
from cloister.policy.model import Egress, EgressRule
from cloister.relay.session import UpstreamProxy

pytestmark = pytest.mark.kernel

FAKE, REAL = "cloister-a-placeholder", "real-a-secret"


def test_curl_uses_a_secret_that_it_never_sees(relay, run, mitm):
    """A placeholder sent by curl arrives as the real token at the bound host, and the event names its credential."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.server("a.test")) as up:
            broker = mitm.broker(a=("a.test", up.port))
            options = {"allow": [f"a.test:{up.port}"], **LOOPBACK, "table": LOCAL, "broker": broker}
            async with relay(**options, trust=mitm.trust) as r:
                await bridge(r, lambda proxy: use(proxy, up.port))
                await until(lambda: r.events)
                event = r.events[0]
                assert (event.protocol, event.host, event.method, event.path) == ("https", "a.test", "GET", "/x")
                assert (event.status, event.credentials, event.verdict) == (200, ("token",), "allow")
                assert FAKE not in repr(r.events)
                assert REAL not in repr(r.events)

    async def use(proxy, port):
        token = f"Authorization: Bearer {FAKE}"
        done = await curl("-x", proxy, "--cacert", str(mitm.ca), "-H", token, f"https://a.test:{port}/x?token=1")
        assert (done.returncode, done.stdout) == (0, b"ok"), done.stderr

    run(scenario())
    assert b"Bearer real-a-secret\r\n" in seen[0]
    assert FAKE.encode() not in seen[0]


def test_other_hosts_are_tunnelled_untouched(relay, run, mitm):
    """A host without a credential keeps its own TLS: the client sees the server's certificate, not ours."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("b.test")) as up:
            broker = mitm.broker(a=("a.test", up.port))
            options = {"allow": [f"*.test:{up.port}"], **LOOPBACK, "table": LOCAL, "broker": broker}
            async with relay(**options, trust=mitm.trust) as r:
                reader, writer = await tunnel_tls(r, "b.test", up.port, mitm.trust(False))
                writer.write(b"GET / HTTP/1.1\r\nHost: b.test\r\nX: cloister-a-placeholder\r\n\r\n")
                assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
                writer.close()
                await until(lambda: r.events)
                assert (r.events[0].protocol, r.events[0].credentials) == ("connect", ())

    run(scenario())


def test_rules_about_methods_and_paths_hold_inside(relay, run, mitm):
    """A rule that limits methods and paths is enforced on each request of a kept connection, where TLS ends here."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.server("a.test")) as up:
            rule = EgressRule(host="a.test", port=up.port, methods=("GET",), paths=("/repos/**",))
            options = {"allow": [rule], **LOOPBACK, "table": LOCAL, "broker": mitm.broker(a=("a.test", up.port))}
            async with relay(**options, trust=mitm.trust) as r:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                wanted = [("GET", "/repos/x", 200), ("POST", "/repos/x", 403), ("GET", "/user", 403)]
                wanted += [("GET", "/repos/../user", 403), ("GET", "/repos/y?page=2", 200)]
                for method, path, status in wanted:
                    writer.write(f"{method} {path} HTTP/1.1\r\nHost: a.test:{up.port}\r\n\r\n".encode())
                    head = await read_head(reader)
                    assert int(head.split()[1]) == status, (method, path, head)
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    body = await reader.readexactly(length)
                    if status == 403:
                        assert json.loads(body)["host"] == "a.test"
                writer.close()
                assert up.connections == 1
                reasons = [event.reason for event in r.events]
                assert reasons[1:4] == ["method-not-allowed", "path-not-allowed", "path-ambiguous"]
                assert [event.path for event in r.events][-1] == "/repos/y"

    run(scenario())
    assert len(seen) == 2


@pytest.mark.parametrize("trusted", [True, False])
def test_an_upstream_proxy_carries_what_is_terminated(relay, run, mitm, trusted):
    """Through an upstream proxy the server's certificate is verified as ever, and the proxy sees no secret."""
    seen, carried = [], bytearray()

    async def proxy(reader, writer):
        head = await read_head(reader)
        port = int(head.split()[1].split(b":")[1])
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

        async def carry(source, sink):
            while data := await source.read(65536):
                carried.extend(data)
                sink.write(data)

        await asyncio.gather(carry(reader, up_writer), carry(up_reader, writer))

    async def scenario():
        tls = mitm.server("a.test" if trusted else "b.test")
        async with Upstream(answering(OK, seen), tls) as up, Upstream(proxy) as middle:
            options = {"allow": [f"a.test:{up.port}"], "trust": mitm.trust, "table": {"proxy.test": ["127.0.0.1"]}}
            options |= {"broker": mitm.broker(a=("a.test", up.port))}
            async with relay(**options, upstream=UpstreamProxy("proxy.test", middle.port)) as r:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                writer.write(f"GET / HTTP/1.1\r\nHost: a.test:{up.port}\r\nX: {FAKE}\r\n\r\n".encode())
                assert (await read_head(reader)).startswith(b"HTTP/1.1 200" if trusted else b"HTTP/1.1 502")
                writer.close()
                await until(lambda: r.events)
                assert r.events[0].via == (f"proxy.test:{middle.port}" if trusted else "")

    run(scenario())
    assert len(seen) == trusted
    assert carried
    assert REAL.encode() not in carried


def test_encrypted_client_hello_is_not_accepted(relay, run, mitm):
    """A hello with ECH (or its GREASE) is served for the outer name, which was checked; the event says it was there."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up:
            broker = mitm.broker(a=("a.test", up.port))
            options = {"allow": [f"a.test:{up.port}"], **LOOPBACK, "table": LOCAL, "broker": broker}
            async with relay(**options, trust=mitm.trust) as r:
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = mitm.client().wrap_bio(incoming, outgoing, server_hostname="a.test")
                with pytest.raises(ssl.SSLWantReadError):
                    tls.do_handshake()
                reader, writer = await r.client()
                writer.write(connect("a.test", up.port))
                await read_head(reader)
                writer.write(with_ech(outgoing.read()))
                answer = await asyncio.wait_for(reader.read(65536), 5)
                assert answer[:1] == b"\x16"  # a ServerHello, not an alert
                writer.close()
                await until(lambda: r.events)
                assert r.events[0].ech

    run(scenario())


def with_ech(record: bytes) -> bytes:
    """Add an encrypted_client_hello extension to a ClientHello of one record."""
    body = bytearray(record[9:])
    at = 34 + 1 + body[34]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    size = int.from_bytes(body[at : at + 2], "big")
    extension = b"\xfe\x0d\x00\x04\x00\x01\x02\x03"
    body[at : at + 2] = (size + len(extension)).to_bytes(2, "big")
    body[at + 2 : at + 2] = extension
    message = b"\x01" + len(body).to_bytes(3, "big") + bytes(body)
    return record[:3] + len(message).to_bytes(2, "big") + message


def test_an_open_websocket_obeys_new_rules(relay, run, mitm):
    """A policy reload that takes the path of an open WebSocket away ends it."""

    async def serve(reader, writer):
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        await reader.read()

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up:
            rule = EgressRule(host="a.test", port=up.port, paths=("/ws",))
            options = {"allow": [rule], **LOOPBACK, "table": LOCAL, "broker": mitm.broker(a=("a.test", up.port))}
            async with relay(**options, trust=mitm.trust) as r:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                head = f"GET /ws HTTP/1.1\r\nHost: a.test:{up.port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                writer.write(f"{head}\r\n".encode())
                assert b" 101 " in await read_head(reader)
                other = EgressRule(host="a.test", port=up.port, paths=("/other",))
                r.server.update(compile_ruleset(Egress(allow=(other,)), agent="claude"))
                await ended(reader)
                writer.close()
                await until(lambda: r.events)
                assert (r.events[0].verdict, r.events[0].reason) == ("deny", "path-not-allowed")

    run(scenario())


def test_a_question_is_asked_once_for_a_connection(relay, run, mitm):
    """In mode ask the person is asked for the connection, not again for each request inside it."""
    asked = []

    async def ask(target):
        asked.append(target.place)
        return "once"

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up:
            options = {"mode": "ask", **LOOPBACK, "table": LOCAL, "broker": mitm.broker(a=("a.test", up.port))}
            async with relay(**options, trust=mitm.trust, ask=ask) as r:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                for _ in range(3):
                    writer.write(f"GET / HTTP/1.1\r\nHost: a.test:{up.port}\r\n\r\n".encode())
                    assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
                    await reader.readexactly(2)
                writer.close()
                await until(lambda: len(r.events) == 3)
                assert {event.reason for event in r.events} == {"allowed-by-user"}

    run(scenario())
    assert len(asked) == 1


def test_a_run_without_credentials_loads_none_of_this():
    """The relay itself imports neither HTTP/2 nor certificates: they come with the first run that needs them."""
    code = "import sys, cloister.relay.server; print(*[m for m in ('h2', 'cryptography', 'hpack') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == ""
