"""A run's egress served on a TCP listener too: for the one guest that may be there, as on its own socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from relay_support import Upstream, answering, read_head

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LOOPBACK = {"private": ["127.0.0.0/8"]}


async def ask(address: tuple[str, int], source: str, host: str) -> bytes:
    """Ask for a page from an address of ours; return the answer's head, nothing when there is none."""
    reader, writer = await asyncio.open_connection(*address, local_addr=(source, 0))
    writer.write(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    try:
        return await read_head(reader)
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    finally:
        writer.close()


def test_the_one_guest_is_served_as_the_run_and_nobody_else(relay, run):
    """Its requests are decided and recorded with the run's; another address gets nothing; both end with the run."""

    async def scenario():
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        table = {"a.test": ["127.0.0.1"]}
        async with (
            Upstream(answering(OK, [])) as up,
            relay(allow=[f"a.test:{up.port}"], **LOOPBACK, table=table) as r,
        ):
            await r.server.start_for(listener, "127.0.0.2")

            assert b" 200 " in await ask(address, "127.0.0.2", f"a.test:{up.port}")
            assert b" 403 " in await ask(address, "127.0.0.2", "b.test")
            assert await ask(address, "127.0.0.3", f"a.test:{up.port}") == b""
            assert [event.verdict for event in r.events] == ["allow", "deny"]
            assert r.server.stats.active <= 2  # the two that were served
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection(*address)
            assert await reader.read() == b""
            writer.close()

    run(scenario())
