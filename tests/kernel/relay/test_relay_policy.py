"""A policy that changes under open tunnels: updates, questions, an upstream proxy, idleness, the end of a run."""

from __future__ import annotations

import asyncio

import pytest
from relay_support import (
    LIMITS,
    LOCAL,
    LOOPBACK,
    Relay,
    Upstream,
    connect,
    echo,
    read_head,
    until,
)  # fmt: skip

from cloister.egress.rules import compile_ruleset
from cloister.policy.model import Egress
from cloister.relay.session import UpstreamProxy

pytestmark = pytest.mark.kernel


def test_a_policy_update_ends_what_is_no_longer_allowed(relay, run):
    """New rules cut open tunnels and responses to hosts they do not allow, and leave the others alone."""

    async def serve(reader, writer):
        if b"GET" in await reader.read(3):
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await echo(reader, writer)

    async def scenario():
        async with (
            Upstream(serve) as up,
            relay(allow=[f"a.test:{up.port}", f"b.test:{up.port}"], **LOOPBACK, table=LOCAL) as r,
        ):
            kept, cut, stream = [await r.client() for _ in range(3)]
            kept[1].write(connect("a.test", up.port))
            cut[1].write(connect("b.test", up.port))
            stream[1].write(b"GET http://b.test:%d/ HTTP/1.1\r\nHost: b\r\n\r\n" % up.port)
            for reader, _ in (kept, cut, stream):
                await read_head(reader)
            r.server.update(compile_ruleset(Egress(allow=(f"a.test:{up.port}",))))
            for reader, _ in (cut, stream):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await asyncio.wait_for(reader.readexactly(1), 5)
            kept[1].write(b"abcdef")
            assert await asyncio.wait_for(kept[0].readexactly(3), 5) == b"def"
            assert b" 403 " in await r.talk(connect("b.test", up.port))
            for _, writer in (kept, cut, stream):
                writer.close()

    run(scenario())


@pytest.mark.parametrize(("answer", "second"), [("once", 2), ("run", 1), ("always", 1), ("never", 1), (None, 2)])
def test_the_user_is_asked_and_the_answer_holds(relay, run, answer, second):
    """`once` opens one connection, `run` and `always` the run, `never` closes it; a dropped question means no."""
    asked = []

    async def ask(target):
        asked.append(target.authority)
        await asyncio.sleep(0.01)
        if answer is None:
            raise ConnectionError
        return answer

    async def scenario():
        async with Upstream(echo) as up, relay(mode="ask", **LOOPBACK, table=LOCAL, ask=ask) as r:
            for _ in range(2):
                reply = await r.talk(connect("a.test", up.port) + b"x", eof=True)
                assert (b" 200 " in reply) == (answer in {"once", "run", "always"})
            metadata = await r.talk(connect("169.254.169.254", 80))
            assert b" 403 " in metadata
            assert b'"remedy":""' in metadata
            assert len(asked) == second

    run(scenario())


def test_one_question_for_many_waiting_clients(relay, run):
    """Clients that want the same place at the same time wait for one answer."""
    asked = []

    async def ask(target):
        asked.append(target)
        await asyncio.sleep(0.1)
        return "once"

    async def scenario():
        async with Upstream(echo) as up, relay(mode="ask", **LOOPBACK, table=LOCAL, ask=ask) as r:
            replies = await asyncio.gather(*(r.talk(connect("a.test", up.port) + b"x", eof=True) for _ in range(5)))
            assert all(b" 200 " in reply for reply in replies)
            assert len(asked) == 1

    run(scenario())


def test_an_upstream_proxy_is_used_and_named(relay, run):
    """Behind a corporate proxy the relay tunnels through it, does not resolve the name, and the event says via."""
    heads: list[bytes] = []

    async def proxy(reader, writer):
        heads.append(await read_head(reader))
        if b"no.test" in heads[-1]:
            writer.write(b"HTTP/1.1 407 Auth\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nearly")
        await echo(reader, writer)

    async def scenario():
        async with Upstream(proxy) as up:
            upstream = UpstreamProxy("127.0.0.1", up.port, "Basic eA==")
            table = {"127.0.0.1": ["127.0.0.1"]}
            async with relay(allow=["a.test:22", "no.test:22"], table=table, upstream=upstream) as r:
                assert (await r.talk(connect("a.test", 22) + b"x", eof=True)).endswith(b"\r\n\r\nearlyx")
                assert b"x-cloister-reason: upstream-proxy-failed" in await r.talk(connect("no.test", 22))
                assert b" 403 " in await r.talk(connect("b.test", 22))
            assert r.resolver.asked == ["127.0.0.1"] * 2
            assert (r.events[0].via, r.events[0].address) == (f"127.0.0.1:{up.port}", "")
        assert heads[0] == b"CONNECT a.test:22 HTTP/1.1\r\nHost: a.test:22\r\nProxy-Authorization: Basic eA==\r\n\r\n"

    run(scenario())


def test_idle_tunnels_end(relay, run):
    """A tunnel without a byte for the idle time is closed on both sides."""

    async def scenario():
        async with (
            Upstream(echo) as up,
            relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL, limits=LIMITS) as r,
        ):
            reader, writer = await r.client()
            writer.write(connect("a.test", up.port))
            await read_head(reader)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            await until(lambda: bool(r.events))
            assert r.events[-1].reason == "idle-timeout"
            writer.close()

    run(scenario())


def test_closing_the_server_ends_and_records_everything(relay, run):
    """When the run ends, open tunnels, requests and silent clients are closed, and each tunnel is on record."""

    async def scenario():
        async with Upstream(echo) as up:
            r: Relay = relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=LOCAL)
            async with r:
                clients = [await r.client() for _ in range(4)]
                for (_, writer), data in zip(
                    clients, (connect("a.test", up.port), b"", b"GET http", b"\x05"), strict=True
                ):
                    writer.write(data)
                await read_head(clients[0][0])
            for reader, writer in clients:
                await asyncio.wait_for(asyncio.gather(reader.read(), return_exceptions=True), 5)
                writer.close()
            assert [event.reason for event in r.events] == ["run-ended"]

    run(scenario())
