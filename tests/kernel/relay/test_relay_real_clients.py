"""Programs that people use, through TLS that ends at the broker, to servers that people run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from h2_support import H2TestClient
from relay_support import OK, Upstream, answering, bridge, curl, read_head, terminated, until

from cloister.credentials.certificates import issue, load_issuer

pytestmark = pytest.mark.kernel

FAKE, REAL = "cloister-a-placeholder", "real-a-secret"


class Nginx:
    """A real nginx on loopback, with HTTP/2, for a.test."""

    def __init__(self, folder: Path, mitm) -> None:
        self.folder, self.mitm, self.port = folder, mitm, 0

    async def __aenter__(self):
        pair = issue(load_issuer(self.mitm.theirs), "a.test", time.time(), b"x")
        key = load_pem_private_key(pair.key_pem, b"x")
        (self.folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (self.folder / "cert.pem").write_bytes(pair.cert_pem)
        (self.folder / "big").write_bytes(b"n" * 3_000_000)
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        user = "user root;" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"""{user} daemon off; pid {self.folder}/pid; error_log {self.folder}/error.log; worker_processes 1;
            events {{ worker_connections 64; }}
            http {{ access_log off; keepalive_requests 5; client_body_temp_path {self.folder}/body;
              proxy_temp_path {self.folder}/p; fastcgi_temp_path {self.folder}/f;
              uwsgi_temp_path {self.folder}/u; scgi_temp_path {self.folder}/s;
              server {{ listen 127.0.0.1:{self.port} ssl http2; server_name a.test;
                ssl_certificate {self.folder}/cert.pem; ssl_certificate_key {self.folder}/key.pem;
                location /who {{ return 200 "$http_authorization $server_protocol\\n"; }}
                location / {{ root {self.folder}; }} }} }}"""
        )
        self.process = await asyncio.create_subprocess_exec(
            "nginx", "-c", str(self.folder / "nginx.conf"), "-e", str(self.folder / "error.log"), "-p", str(self.folder)
        )
        for _ in range(100):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return self
            await asyncio.sleep(0.05)
        raise AssertionError((self.folder / "error.log").read_text())

    async def __aexit__(self, *_):
        self.process.terminate()
        await self.process.wait()


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_curl_and_nginx_speak_http2_through_it(relay, run, mitm, tmp_path):
    """Curl over HTTP/2 and HTTP/1.1 gets pages of a real nginx, large ones too, and nginx sees the real secret."""

    async def scenario():
        async with Nginx(tmp_path, mitm) as server, terminated(relay, mitm, server.port) as r:
            await bridge(r, lambda proxy: use(proxy, server.port))
            assert {event.credentials for event in r.events} == {("token",), ()}

    async def use(proxy, port):
        url, common = f"https://a.test:{port}", ("-x", proxy, "--cacert", str(mitm.ca))
        token = ("-H", f"Authorization: Bearer {FAKE}")
        for version, spoken in (("--http2", b"HTTP/2.0"), ("--http1.1", b"HTTP/1.1")):
            done = await curl(*common, *token, version, f"{url}/who")
            assert done.stdout == b"Bearer real-a-secret " + spoken + b"\n", done.stderr
            done = await curl(*common, version, f"{url}/big", f"{url}/big")
            assert done.stdout == b"n" * 6_000_000, done.stderr
            done = await curl(*common, version, "-I", f"{url}/big")
            assert b"content-length: 3000000" in done.stdout.lower()
            done = await curl(*common, version, "-o", "/dev/null", "-w", "%{http_code}", f"{url}/none")
            assert done.stdout == b"404"

    run(scenario())


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_a_server_that_says_goodbye_finishes_what_it_has(relay, run, mitm, tmp_path):
    """Nginx says GOAWAY every few requests: those under way are answered, the next ones go to a new connection."""

    async def scenario():
        async with Nginx(tmp_path, mitm) as server, terminated(relay, mitm, server.port) as r:
            client = await H2TestClient.open(r, "a.test", server.port, mitm.client("h2"))
            for _ in range(4):
                numbers = [client.request("GET", f"a.test:{server.port}", "/big") for _ in range(3)]
                numbers += [client.request("GET", f"a.test:{server.port}", "/who") for _ in range(3)]
                for number in numbers[:3]:
                    status, _, body, _ = await client.response(number)
                    assert (status, len(body)) == (200, 3_000_000)
                assert [(await client.response(number))[0] for number in numbers[3:]] == [200] * 3
            await client.close()

    run(scenario())


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_node_trusts_the_authority_by_its_variable(relay, run, mitm, tmp_path):
    """Node with NODE_EXTRA_CA_CERTS, over the tunnel it opens itself, gets an answer made with the real secret."""
    seen: list[bytes] = []
    script = tmp_path / "client.js"
    script.write_text("""
        const http = require('http'), https = require('https'), url = new URL(process.argv[2]);
        const target = process.argv[3];
        http.request({host: url.hostname, port: url.port, method: 'CONNECT', path: target})
          .on('connect', (_, socket) => {
            https.get({host: 'a.test', servername: 'a.test', path: '/n', socket, agent: false,
              headers: {Host: target, Authorization: 'Bearer cloister-a-placeholder'}}, res => {
                res.on('data', d => process.stdout.write(d)); res.on('end', () => process.exit(0)); });
          }).end();""")

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            await bridge(r, lambda proxy: use(proxy, up.port))

    async def use(proxy, port):
        environment = {**os.environ, "NODE_EXTRA_CA_CERTS": str(mitm.ca)}
        process = await asyncio.create_subprocess_exec(
            "node", str(script), proxy, f"a.test:{port}", stdout=-1, stderr=-1, env=environment
        )
        out, err = await asyncio.wait_for(process.communicate(), 20)
        assert out == b"ok", err

    run(scenario())
    assert b"Bearer real-a-secret" in seen[0]


def test_openssl_cannot_renegotiate(relay, run, mitm):
    """Openssl s_client over TLS 1.2 gets its session, and a renegotiation it asks for ends the connection."""

    async def scenario():
        async with Upstream(answering(OK), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            await bridge(r, lambda proxy: use(proxy.removeprefix("http://"), up.port))

    async def use(proxy, port):
        command = ["openssl", "s_client", "-proxy", proxy, "-connect", f"a.test:{port}", "-servername", "a.test"]
        command += ["-CAfile", str(mitm.ca), "-verify_return_error", "-tls1_2", "-no_ign_eof"]
        process = await asyncio.create_subprocess_exec(*command, stdin=-1, stdout=-1, stderr=subprocess.STDOUT)
        process.stdin.write(b"R\n")
        await process.stdin.drain()
        await asyncio.sleep(0.5)
        with contextlib.suppress(RuntimeError, ConnectionError):  # it has left already
            process.stdin.write(f"GET / HTTP/1.1\r\nHost: a.test:{port}\r\n\r\n".encode())
            process.stdin.close()
        out = await asyncio.wait_for(process.stdout.read(), 10)
        await process.wait()
        assert b"Verify return code: 0 (ok)" in out or b"Verification: OK" in out
        assert b"RENEGOTIATING" in out
        assert b"200 OK" not in out

    run(scenario())


def test_curl_comes_by_socks_too(relay, run, mitm):
    """The name of a bound host given by SOCKS5 leads to the same place as CONNECT."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            await bridge(r, lambda proxy: use(proxy.replace("http", "socks5h"), up.port))
            await until(lambda: r.events)
            assert r.events[0].protocol == "https"

    async def use(proxy, port):
        token = f"Authorization: Bearer {FAKE}"
        done = await curl("-x", proxy, "--cacert", str(mitm.ca), "-H", token, f"https://a.test:{port}/")
        assert done.stdout == b"ok", done.stderr

    run(scenario())
    assert b"real-a-secret" in seen[0]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_memory_stays_flat_during_a_large_upload(relay, run, mitm, version):
    """Four hundred megabytes go through while this process, server included, grows by a few."""
    got = 0

    async def serve(reader, writer):
        nonlocal got
        head = await read_head(reader)
        assert b"expect: 100-continue" in head.lower() or b"transfer-encoding" in head.lower()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 20)
            if not data:
                return
            got += len(data)
            end = (end + data)[-5:]
        writer.write(OK)

    async def scenario():
        async with Upstream(serve, mitm.server("a.test")) as up, terminated(relay, mitm, up.port) as r:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            await bridge(r, lambda proxy: use(proxy, up.port))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 40_000, grown

    async def use(proxy, port):
        command = f"head -c 400000000 /dev/zero | curl -sS --noproxy '' -x {proxy} --cacert {mitm.ca} {version} "
        command += f"-H 'Expect: 100-continue' -T - https://a.test:{port}/up"
        process = await asyncio.create_subprocess_shell(command, stdout=-1, stderr=-1)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert out == b"ok", err

    run(scenario(), 70)
    assert got >= 400_000_000
