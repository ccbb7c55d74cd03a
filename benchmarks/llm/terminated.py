"""TLS that ends at the proxy, beside mitmproxy and beside tunnels: connections, requests, a large download.

The server is nginx with a certificate of an authority made for the benchmark. Ours is the whole product: a run of
`cloister` whose policy binds a credential to the server, entered by the run's own socket; its proxy is the broker.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import Missing
from benchmarks.llm import programs, stacks, tls_client, usage
from benchmarks.llm.cells import middle
from benchmarks.llm.names import MITMPROXY, OURS
from benchmarks.report import Grid, Line
from benchmarks.world import AGENT, World
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "host.cloister.internal"
"""What a policy calls this machine (loopback is refused by its own name); mitmproxy asks for `localhost`."""
ROUNDS = 3
DIRECT_TLS, TUNNEL, ENDS = "no proxy", "tunnel", "TLS ends there"
NGINX_CONF = """\
daemon off;
worker_processes 1;
pid {folder}/tls.pid;
error_log {folder}/tls.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/tls-body;
    proxy_temp_path {folder}/tls-proxy;
    fastcgi_temp_path {folder}/tls-fastcgi;
    uwsgi_temp_path {folder}/tls-uwsgi;
    scgi_temp_path {folder}/tls-scgi;
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{port} ssl backlog=1024;
        ssl_certificate {folder}/server.pem;
        ssl_certificate_key {folder}/server.key;
        ssl_protocols TLSv1.3;
        ssl_session_tickets off;
        root {folder}/served;
    }}
}}
"""
NOTE = """\
One client, one connection at a time. New: TCP, CONNECT, TLS and one small request, 150 times. Kept: 1,000 small ones
on one connection. Large: 256 MiB. Where TLS ends at the proxy there are two handshakes and two ciphers instead of none,
the request is decided with its method and path, and (ours) a secret is put in. CPU is that of the proxy. Ours is the
broker of a real run, and writes an event for each connection or request; mitmproxy is `mitmdump` without any script."""
COLUMNS = ("new, ms", "new: CPU, ms", "kept, µs", "kept: CPU, µs", "large, MB/s", "large: CPU, s", "memory, MB")


class Route(NamedTuple):
    """One way to the server."""

    name: str
    proxy: str
    target: str
    ca: Path
    token: str
    pids: Sequence[int]


def terminated(folder: Path, cores: tuple[int, int]) -> list[Grid]:
    """Measure all ways that are there, in turn."""
    with ExitStack() as stack:
        port = stack.enter_context(_server(folder, cores[1]))
        ca = folder / "ca.pem"
        routes = [Route(DIRECT_TLS, "-", f"localhost:{port}", ca, "none", ())]
        missing = []
        try:
            routes += stack.enter_context(_ours(port, ca, cores[0]))
        except (RuntimeError, OSError, AssertionError) as error:
            missing.append(Missing(OURS, str(error).strip().splitlines()[-1] if str(error) else repr(error)))
        if programs.peer(MITMPROXY, "mitmdump"):
            for name, words in ((TUNNEL, ("--ignore-hosts", ".*")), (ENDS, ())):
                routes.append(stack.enter_context(_mitmproxy(folder, port, name, words, cores[0])))
        else:
            missing.append(Missing(MITMPROXY, "mitmproxy is not installed"))
        return [_grid(_rounds(routes, cores[1]), missing)]


def _rounds(routes: Sequence[Route], core: int) -> dict[str, dict[str, list[float]]]:
    """Measure each thing on each route, in random order."""
    samples: dict[str, dict[str, list[float]]] = {route.name: {} for route in routes}
    for number in range(ROUNDS):
        for what in tls_client.COUNTS:
            for route in random.sample(routes, len(routes)):
                for column, value in _sample(route, what, core).items():
                    samples[route.name].setdefault(column, []).append(value)
        print(f"    round {number + 1}: TLS", file=sys.stderr, flush=True)
    for route in routes:
        if route.pids:
            samples[route.name]["memory, MB"] = [usage.memory_mb(route.pids)]
    return samples


def _sample(route: Route, what: str, core: int) -> dict[str, float]:
    words = (route.proxy, route.target, str(route.ca), route.token, what)
    before = usage.cpu_s(route.pids)
    done = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, str(Path(tls_client.__file__)), *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{route.name}: {done.stderr}")
    said, used = json.loads(done.stdout), usage.cpu_s(route.pids) - before
    each = used / said["count"]
    if what == "connect":
        found = {"new, ms": said["us"] / 1e3, "new: CPU, ms": each * 1e3}
    elif what == "request":
        found = {"kept, µs": said["us"], "kept: CPU, µs": each * 1e6}
    else:
        found = {"large, MB/s": tls_client.LARGE / said["seconds"] / 1e6, "large: CPU, s": used}
    return {column: value for column, value in found.items() if "CPU" not in column or route.pids}


def _grid(samples: dict[str, dict[str, list[float]]], missing: Sequence[Missing]) -> Grid:
    lines = [Line(name, {column: middle(values) for column, values in by.items()}) for name, by in samples.items()]
    return Grid("TLS that ends at the proxy", COLUMNS, [*lines, *missing], NOTE)


@contextmanager
def _server(folder: Path, core: int) -> Iterator[int]:
    """Run the server that all ways lead to; give its port."""
    if not programs.nginx():
        raise RuntimeError("nginx is not installed, and it is the server of this table")
    _certificates(folder)
    served = folder / "served"
    served.mkdir()
    (served / "small").write_bytes(b"s" * 1000)
    with (served / "large").open("wb") as file:
        file.truncate(tls_client.LARGE)
    port = stacks.free_port()
    conf = folder / "tls.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, port=port))
    argv = [programs.nginx(), "-c", str(conf), "-p", str(folder)]
    process, _ = stacks.start(folder, "tls-server", argv, core, port)
    server = stacks.Stack("server", port, process=process)
    try:
        yield port
    finally:
        server.stop()


def _certificates(folder: Path) -> None:
    """Write an authority and a certificate of it, for a day."""
    now = dt.datetime.now(dt.UTC)
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])

    def made(subject: x509.Name, public: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
        builder = builder.not_valid_before(now - dt.timedelta(hours=1))
        builder = builder.not_valid_after(now + dt.timedelta(days=1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    ca = made(issuer, authority.public_key(), x509.BasicConstraints(ca=True, path_length=0), identifier)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName(HOST)])
    issued = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    leaf = made(x509.Name([]), key.public_key(), x509.BasicConstraints(ca=False, path_length=None), names, issued)
    (folder / "ca.pem").write_bytes(ca)
    (folder / "server.pem").write_bytes(leaf)
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip


@contextmanager
def _mitmproxy(folder: Path, port: int, name: str, words: Sequence[str], core: int) -> Iterator[Route]:
    """Run mitmproxy's command line, without scripts, flows and logs."""
    listening, conf = stacks.free_port(), folder / f"mitm-{len(words)}"
    argv = [
        programs.peer(MITMPROXY, "mitmdump"), "--quiet", "--listen-host", "127.0.0.1", "--listen-port", str(listening),
        "--set", f"confdir={conf}", "--set", f"ssl_verify_upstream_trusted_ca={folder / 'ca.pem'}",
        "--set", "stream_large_bodies=1", "--set", "http2=false", *words,
    ]  # fmt: skip
    process, _ = stacks.start(folder, MITMPROXY, argv, core, listening)
    running = stacks.Stack(MITMPROXY, listening, process=process)
    ca = conf / "mitmproxy-ca-cert.pem" if name == ENDS else folder / "ca.pem"
    try:
        yield Route(
            f"{MITMPROXY}, {name}", f"127.0.0.1:{listening}", f"localhost:{port}", ca, "none", running.pids
        )  # fmt: skip
    finally:
        running.stop()


@contextmanager
def _ours(port: int, ca: Path, core: int) -> Iterator[list[Route]]:
    """Start two runs of one broker, one of which has a credential for the server; their sockets are the ways in."""
    policy = "schema = 1\n\n" + AGENT.format(name="plain") + AGENT.format(name="bound")
    for name in ("plain", "bound"):
        policy += f'\n[agents.{name}.egress]\nallow = ["{HOST}:{port}"]\n'
    policy += (
        '\n[agents.bound.credentials.bench]\nsecret = "env:CLOISTER_BENCH_SECRET"\nenv = "BENCH_TOKEN"\n'
        f'inject = {{ host = "{HOST}", port = {port}, scheme = "bearer" }}\n'
    )
    world = World("terminated", policy)
    world.environment |= {"CLOISTER_BENCH_SECRET": "made-up-secret-of-the-owner", "SSL_CERT_FILE": str(ca)}
    processes = []
    try:
        routes = []
        for name in ("plain", "bound"):
            process, said = _run(world, name)
            processes.append(process)
            trusted = ca if name == "plain" else Path(said["ca"])
            way = TUNNEL if name == "plain" else ENDS
            routes.append(
                Route(f"{OURS}, {way}", said["socket"], f"{HOST}:{port}", trusted, said["token"], [world.broker])
            )
        usage.let_run_on([world.broker], [core])
        yield routes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        world.close()


def _run(world: World, name: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Start a run that stays; return what its agent was given, and its socket as seen from outside."""
    script = 'echo "${BENCH_TOKEN:-none}"; cat "${SSL_CERT_FILE:-/dev/null}" >ca.pem; echo ready; exec sleep 1000'
    process = subprocess.Popen(
        ["cloister", "run", name, "--", "/bin/sh", "-c", script], cwd=world.project, env=world.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    token = process.stdout.readline().strip()
    if process.stdout.readline().strip() != "ready":
        process.kill()
        raise RuntimeError(process.communicate()[1] or "the run did not start")
    ca = world.home / f"{name}.pem"
    os.replace(world.project / "ca.pem", ca)
    time.sleep(0.1)
    sockets = sorted((world.runtime / "cloister/runs").glob("*/box/egress.sock"), key=lambda path: path.stat().st_mtime)
    return process, {"token": token, "ca": str(ca), "socket": str(sockets[-1])}
