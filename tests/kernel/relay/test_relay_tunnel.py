"""Tunnels through the relay: CONNECT and SOCKS5, TLS names, addresses, pressure, and a policy that changes."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import struct

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
    echo,
    ended,
    read_head,
    socks,
    until,
)  # fmt: skip

from cloister.egress.rules import compile_ruleset
from cloister.policy.model import Egress

pytestmark = pytest.mark.kernel


@pytest.fixture
def tls_server(certificate) -> ssl.SSLContext:
    """The server's side of TLS with the test certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_curl_speaks_tls_through_connect_and_socks(relay, run, certificate, tls_server):
    """The real curl speaks TLS with the server itself through both kinds of tunnel, without resolving the name."""

    async def scenario():
        table = {"tls.test": ["127.0.0.1"]}
        async with (
            Upstream(answering(OK), tls_server) as up,
            relay(allow=[f"tls.test:{up.port}"], **LOOPBACK, table=table) as r,
        ):

            async def use(proxy):
                for kind in (proxy, proxy.replace("http", "socks5h")):
                    url = f"https://tls.test:{up.port}/"
                    done = await curl("-x", kind, "--cacert", str(certificate[0]), url)
                    assert (done.returncode, done.stdout) == (0, b"ok"), done.stderr

            await bridge(r, use)
            await until(lambda: len(r.events) == 2)
            assert {event.protocol for event in r.events} == {"connect", "socks5"}

    run(scenario())


@pytest.mark.parametrize("name", ["other.test", None])
@pytest.mark.parametrize("protocol", [connect, socks])
def test_tls_must_ask_for_the_name_of_the_tunnel(relay, run, tls_server, name, protocol):
    """TLS for another name, or for none, is cut before the server sees a byte, in both protocols."""
    seen = bytearray()

    async def serve(reader, writer):
        seen.extend(await reader.read(100))

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            hello = client_hello(name)
            half = len(hello) // 2
            reader, writer = await r.client()
            writer.write(protocol("a.test", up.port) + hello[:half])
            await asyncio.sleep(0.05)
            writer.write(hello[half:])
            await ended(reader)
            await until(lambda: bool(r.events))
            assert r.events[-1].reason == ("sni-mismatch" if name else "sni-missing")
            assert r.events[-1].verdict == "deny"
            writer.close()

    run(scenario())
    assert not seen


def client_hello(name: str | None) -> bytes:
    """Return a real ClientHello of Python's ssl."""
    context = ssl.create_default_context()
    context.check_hostname = False
    inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(inside, outside, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outside.read()


def test_denied_names_never_reach_the_resolver(relay, run):
    """A name outside the allowlist is not looked up in any protocol, so DNS carries nothing out; an allowed one is."""

    async def scenario():
        async with relay(allow=["ok.test"]) as r:
            name = "c2VjcmV0.canary.test"
            assert b" 403 " in await r.talk(connect(name, 443))
            assert (await r.talk(socks(name, 443)))[3] == 2
            assert b" 403 " in await r.talk(f"GET http://{name}/ HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            assert r.resolver.asked == []
            assert b" 502 " in await r.talk(connect("ok.test", 443))
            assert r.resolver.asked == ["ok.test"]
            assert r.events[-1].reason == "dns-failed"

    run(scenario())


def test_a_rebinding_name_leads_nowhere(relay, run):
    """BF12: an allowed name that resolves to loopback or metadata is refused; what was checked is dialled."""

    async def scenario():
        table = {
            "a.test": [["198.51.100.9", "127.0.0.1"], ["127.0.0.1"]],
            "m.test": ["169.254.169.254", "fd00:ec2::254"],
        }
        async with Upstream(echo) as up, relay(allow=[f"a.test:{up.port}", "m.test"], table=table) as r:
            for host, port in (("a.test", up.port), ("a.test", up.port), ("m.test", 443)):
                answer = await r.talk(connect(host, port))
                assert b"x-cloister-reason: address-refused" in answer
            assert up.connections == 0
            assert (await r.talk(socks("m.test", 443)))[3] == 2

    run(scenario())


def test_refused_addresses_of_a_name_are_passed_over(relay, run):
    """When only some addresses of a name are refused, the others are dialled, the next one when one fails."""

    async def scenario():
        async with Upstream(echo) as up:
            table = {"a.test": ["10.0.0.1", "127.0.0.3", "127.0.0.1"]}
            options = {"allow": [f"a.test:{up.port}"], "private": ["127.0.0.0/8"]}
            async with relay(**options, table=table) as r:
                answer = await r.talk(connect("a.test", up.port) + b"hi", eof=True)
                assert answer.endswith(b"\r\n\r\nhi")
            assert r.events[-1].address == "127.0.0.1"

    run(scenario())


SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "0",
    "0.0.0.0",  # noqa: S104 - a spelling of loopback for connect(2)
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[fe80::1]",
    "[2001:db8::5efe:7f00:1]",
    "169.254.169.254",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "[fd00:ec2::254]",
    "[fd20:ce::254]",
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "localhost",
    "127.0.0.1.",
    "LOCALHOST.",
    "ip6-localhost",
    "metadata.google.internal",
    "cloister.internal",
    "host.cloister.internal",
    "x.host.cloister.internal",
]


@pytest.mark.parametrize("mode", ["deny", "learn", "internet"])
def test_no_spelling_reaches_this_machine(relay, run, mode):
    """Every spelling of loopback, private and metadata addresses is refused in every mode and protocol."""

    async def scenario():
        table = {name.lower().rstrip("."): ["127.0.0.1"] for name in SPELLINGS}
        async with Upstream(echo) as up, relay(mode=mode, table=table) as r:
            for spelling in SPELLINGS:
                assert b" 403 " in await r.talk(connect(spelling, up.port)), spelling
                name = spelling.strip("[]")
                assert (await r.talk(socks(name, up.port)))[3] == 2, spelling
            assert up.connections == 0
            assert r.resolver.asked == []

    run(scenario())


def test_the_hosts_loopback_is_opened_by_its_reserved_name_only(relay, run):
    """`host.cloister.internal:PORT` reaches 127.0.0.1:PORT when a rule names exactly that port."""

    async def scenario():
        async with Upstream(echo) as up, Upstream(echo) as other:
            async with relay(allow=[f"host.cloister.internal:{up.port}", "*.internal:1", "*.cloister.internal:2"]) as r:
                assert (await r.talk(connect("host.cloister.internal", up.port) + b"x", eof=True)).endswith(b"x")
                assert b" 403 " in await r.talk(connect("host.cloister.internal", other.port))
                assert b" 403 " in await r.talk(connect("127.0.0.1", up.port))
                assert b" 403 " in await r.talk(connect("x.cloister.internal", 2))
            assert r.resolver.asked == []

    run(scenario())


def test_half_close_goes_through_in_both_directions(relay, run):
    """After the client's end the server can still answer, and after the server's end the client can still send."""
    got = bytearray()

    async def serve(reader, writer):
        if await reader.readexactly(1) == b"s":
            writer.write(b"bye")
            writer.write_eof()
        got.extend(await reader.read())
        if writer.can_write_eof() and not got:
            writer.write(b"after")

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            assert (await r.talk(connect("a.test", up.port) + b"c", eof=True)).endswith(b"\r\n\r\nafter")
            reader, writer = await r.client()
            writer.write(connect("a.test", up.port) + b"s")
            assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"bye")
            writer.write(b"late")
            writer.write_eof()
            await asyncio.sleep(0.1)
            writer.close()
        assert bytes(got) == b"late"

    run(scenario())


def test_a_server_that_speaks_first_is_heard(relay, run):
    """A greeting such as SSH's passes before the client has sent anything."""

    async def serve(reader, writer):
        writer.write(b"SSH-2.0-x\r\n")
        await reader.read()

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            writer.write(connect("a.test", up.port))
            await read_head(reader)
            assert await asyncio.wait_for(reader.readline(), 5) == b"SSH-2.0-x\r\n"
            writer.close()

    run(scenario())


def test_a_reset_of_the_server_ends_the_client(relay, run):
    """A server that resets ends the client's connection soon, and the event says so."""

    async def serve(reader, writer):
        await reader.readexactly(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: close sends RST

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            await r.talk(connect("a.test", up.port) + b"x")
            await until(lambda: bool(r.events))
            assert r.events[-1].reason == "connection-reset"

    run(scenario())


@pytest.mark.parametrize("direction", ["tunnel down", "tunnel up", "http down", "http up"])
def test_a_gigabyte_passes_in_bounded_memory(relay, run, direction):  # noqa: C901 - four ways, one promise
    """1 GB goes each way whole, while this process, relay and both ends together, grows by less than 48 MiB."""
    size, piece = 1 << 30, bytes(1 << 20)
    received = 0

    async def send(writer):
        for _ in range(size // len(piece)):
            writer.write(piece)
            await writer.drain()

    async def take(reader):
        nonlocal received
        while received < size:
            received += len(await reader.read(1 << 18))

    async def serve(reader, writer):
        if "http" in direction:
            await read_head(reader)
        if "up" in direction:
            await take(reader)
            writer.write(OK)
        else:
            if "http" in direction:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            await send(writer)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            length = b"Content-Length: %d\r\n" % size if "up" in direction else b""
            http = b"POST http://a.test:%d/ HTTP/1.1\r\n%b\r\n" % (up.port, length)
            writer.write(http if "http" in direction else connect("a.test", up.port))
            if direction != "http up":
                await read_head(reader)
            before = resident()
            if "up" in direction:
                await send(writer)
                assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
            else:
                await take(reader)
            assert received == size
            assert resident() - before < 48 << 20
            writer.close()

    run(scenario(), 90)


@pytest.mark.parametrize("kind", ["tunnel", "tunnel without pump", "http"])
def test_a_client_that_does_not_read_stops_the_server(relay, run, kind, monkeypatch):
    """Bytes for a client that does not read wait at the server, not in the relay's memory."""
    sent = 0
    if kind == "tunnel without pump":
        monkeypatch.setattr("cloister.relay.tunnel.BULK", 1 << 60)

    async def serve(reader, writer):
        nonlocal sent
        await reader.readexactly(1)
        if kind == "http":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await asyncio.wait_for(writer.drain(), 1)
            sent += 1 << 16

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            _, writer = await r.client()
            writer.transport.pause_reading()
            get = b"GET http://a.test:%d/ HTTP/1.1\r\n\r\n" % up.port
            writer.write(get if kind == "http" else connect("a.test", up.port) + b"x")
            await asyncio.sleep(0.7)
            stopped = sent
            await asyncio.sleep(0.3)
            assert stopped == sent < 32 << 20
            writer.transport.abort()

    run(scenario())


def test_bulk_transfers_keep_every_byte_and_both_ends(relay, run):
    """Directions that were handed to the kernel deliver the same bytes, pass half-close on, and are counted."""
    size = 5_000_000
    data = random.Random(7).randbytes(size)  # noqa: S311 - any bytes

    async def scenario():
        async with Upstream(echo) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            before = len(os.listdir("/proc/self/fd"))
            reader, writer = await r.client()
            writer.write(connect("a.test", up.port))
            await read_head(reader)

            async def send():
                for at in range(0, size, 100_000):
                    writer.write(data[at : at + 100_000])
                    await writer.drain()
                    await asyncio.sleep(0)
                writer.write_eof()

            sender = asyncio.create_task(send())
            assert await asyncio.wait_for(reader.read(), 20) == data
            await sender
            writer.close()
            await until(lambda: bool(r.events))
            assert (r.events[0].bytes_up, r.events[0].bytes_down, r.events[0].reason) == (size, size, "allowed-by-rule")
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(scenario())


@pytest.mark.parametrize("side", ["client", "policy"])
def test_bulk_transfers_end_with_their_tunnel(relay, run, side):
    """A client that leaves, or a policy that no longer allows the host, stops a transfer inside the kernel too."""

    async def serve(reader, writer):
        await reader.readexactly(1)
        while True:
            writer.write(bytes(1 << 16))
            await asyncio.wait_for(writer.drain(), 5)

    async def scenario():
        async with Upstream(serve) as up, relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL) as r:
            reader, writer = await r.client()
            writer.write(connect("a.test", up.port) + b"x")
            for _ in range(100):
                await reader.readexactly(1 << 16)
            if side == "client":
                writer.transport.abort()
            else:
                r.server.update(compile_ruleset(Egress()))
                await ended(reader)
            await until(lambda: bool(r.events))
            assert r.events[0].bytes_down > 6_000_000
            assert r.events[0].verdict == ("allow" if side == "client" else "deny")
            writer.close()

    run(scenario())


def resident() -> int:
    """Return the resident size of this process in bytes."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
