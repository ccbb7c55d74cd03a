"""The inference proxy as a process of its own, and an upstream that does with each request whatever a test says.

`Proxy` starts `cloister.services.inference` for a made-up home with two agents: `agent`, whose provider is the upstream
of the test, and `other`, whose provider may be another one, so that it can be seen whether one agent's trouble is the
other's. `Scripted` reads whole requests and hands each to the test, which writes raw bytes. For tests only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import apsw

REAL_KEY = "made-up-key-of-the-owner"
KEYS = {"agent": "made-up-virtual-key-1", "other": "made-up-virtual-key-2"}
MODEL = "claude-sonnet-4-5"
POLICY = """\
schema = 1

[providers.{name}]
protocol = "anthropic"
base_url = "http://127.0.0.1:{port}"
key = "file:~/up.key"
connect_timeout = "2s"
first_byte_timeout = "{first_byte}"
idle_timeout = "{idle}"

[providers.{name}-openai]
protocol = "openai-responses"
base_url = "http://127.0.0.1:{port}"
key = "file:~/up.key"

[agents.{name}]
command = ["true"]

[agents.{name}.llm]
providers = ["{name}", "{name}-openai"]
requests_per_minute = 1_000_000_000
tokens_per_day = 1_000_000_000_000
cost_per_day_usd = 1_000_000_000.0
"""
JSON = (
    b'{"id":"msg_01","type":"message","role":"assistant","model":"claude-sonnet-4-5","content":[{"type":"text",'
    b'"text":"hello"}],"stop_reason":"end_turn","usage":{"input_tokens":7,"output_tokens":5}}'
)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(JSON), JSON)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST_EVENT = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_01","type":"message","role":"assistant",'
    b'"model":"claude-sonnet-4-5","content":[],"usage":{"input_tokens":7,"output_tokens":1}}}\n\n'
)
DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
    b'"text":"hello"}}\n\n'
)
LAST_EVENTS = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":5}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
Script = Callable[[socket.socket, bytes], bool | None]
"""Answers one request; returns whether the connection is kept."""


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(conn: socket.socket, request: bytes) -> bool:
    """Answer as a sound upstream does."""
    if b'"stream":true' in request:
        conn.sendall(STREAM_HEAD + chunk(FIRST_EVENT) + chunk(DELTA) + chunk(LAST_EVENTS) + b"0\r\n\r\n")
    else:
        conn.sendall(OK)
    return True


class Scripted:
    """An upstream; `script` may be changed at any time, `requests` holds what arrived whole."""

    def __init__(self, script: Script = answer) -> None:
        """Listen."""
        self.script = script
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                conn, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        kept = b""
        with conn, contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in kept:
                    if not (more := conn.recv(65536)):
                        return
                    kept += more
                head, _, kept = kept.partition(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                while len(kept) < length:
                    if not (more := conn.recv(1 << 20)):
                        return
                    kept += more
                request, kept = head + b"\r\n\r\n" + kept[:length], kept[length:]
                self.requests.append(request)
                if not self.script(conn, request):
                    return


class Proxy:
    """The proxy under test."""

    def __init__(self, home: Path, port: int, other_port: int, *, first_byte: str = "10m", idle: str = "5m") -> None:
        """Write policy, keys and secret; `start` begins."""
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        (home / ".config/cloister").mkdir(parents=True)
        (home / "run").mkdir(mode=0o700)
        policy = POLICY.format(name="agent", port=port, first_byte=first_byte, idle=idle)
        policy += POLICY.format(name="other", port=other_port, first_byte="10m", idle="5m").removeprefix("schema = 1\n")
        self._write(".config/cloister/cloister.toml", policy)
        self._write("up.key", REAL_KEY)
        self._write("keys", "".join(f"{agent} {key}\n" for agent, key in KEYS.items()))
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    def _write(self, name: str, text: str) -> None:
        path = self.home / name
        path.touch(mode=0o600)
        path.write_text(text)

    def start(self) -> Self:
        """Start it and wait until it listens."""
        environment = {**os.environ, "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home / "run")}
        argv = [sys.executable, "-m", "cloister.services.inference", "--keys", str(self.home / "keys")]
        with (self.home / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*argv, "--listen", "127.0.0.1:0"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], 20)[0], self.log
        line = self.process.stdout.readline()
        assert line, self.log
        self.port = int(line.rpartition(":")[2])
        return self

    @property
    def log(self) -> str:
        """What it said on standard error."""
        return (self.home / "log").read_text()

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal and wait for it."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        if self.process and self.process.stdout:
            self.process.stdout.close()

    def memory_mb(self, what: str = "VmRSS") -> float:
        """Return its resident set, or with `VmHWM` the largest it ever had, in MB."""
        assert self.process
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) / 1000

    def rows(self) -> list[dict[str, Any]]:
        """Return the ledger's rows, oldest first. Ask after `end`, when nothing is on its way any more."""
        path = self.home / ".local/state/cloister/ledger/ledger.db"
        database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        names = [column[1] for column in database.execute("pragma table_info(calls)")]
        rows = [dict(zip(names, row, strict=True)) for row in database.execute("select * from calls order by id")]
        database.close()
        return rows

    def dispatched(self, agent: str = "agent") -> list[dict[str, Any]]:
        """Return the rows of calls that were not refused."""
        return [row for row in self.rows() if row["agent"] == agent and row["outcome"] != "refused"]


def request(
    agent: str = "agent", *, stream: bool = False, tokens: int = 64, text: str = "hi", close: bool = True
) -> bytes:
    """Return one whole request, by default the last of its connection."""
    said = {"model": MODEL, "max_tokens": tokens, "stream": stream, "messages": [{"role": "user", "content": text}]}
    body = json.dumps(said, separators=(",", ":")).encode()
    lines = [
        "POST /v1/messages HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEYS[agent]}",
        "Content-Type: application/json", "anthropic-version: 2023-06-01", f"Content-Length: {len(body)}",
        *(["Connection: close"] if close else []),
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def send(port: int, data: bytes, timeout_s: float = 20) -> bytes:
    """Send bytes on a new connection, and return what comes back until its end.

    Raises:
        TimeoutError: it has no end.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as conn:
        with contextlib.suppress(ConnectionError):
            conn.sendall(data)
        return read_all(conn)


def probe(port: int, data: bytes, silence_s: float = 1.0) -> bytes:
    """Send bytes on a new connection that may stay open, and return what comes back until it falls silent."""
    got = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as conn:
        with contextlib.suppress(ConnectionError):
            conn.sendall(data)
        conn.settimeout(silence_s)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while more := conn.recv(1 << 20):
                got += more
    return bytes(got)


def read_all(conn: socket.socket) -> bytes:
    """Read until the end; a reset is an end as well."""
    got = bytearray()
    with contextlib.suppress(ConnectionError):
        while more := conn.recv(1 << 20):
            got += more
    return bytes(got)


def call(port: int, agent: str = "agent", *, stream: bool = False, timeout_s: float = 20) -> tuple[int, bytes]:
    """Make one call with a library of another kind; return status and body.

    Raises:
        http.client.IncompleteRead: the answer broke off.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        head, _, body = request(agent, stream=stream, close=False).partition(b"\r\n\r\n")
        lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
        connection.request("POST", "/v1/messages", body, {name: value for name, value in lines if name != "Host"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Bystander:
    """The other agent, at work all the time: what it meets is what one agent's trouble does to another."""

    def __init__(self, proxy: Proxy) -> None:
        """Take the proxy; begins inside `with`."""
        self.proxy = proxy
        self.times: list[float] = []
        self.failures: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._over.wait(0.02):
            began = time.monotonic()
            try:
                status, body = call(self.proxy.port, "other", timeout_s=10)
                if (status, body) != (200, JSON):
                    self.failures.append(f"{status} {body[:200]!r}")
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            self.times.append(time.monotonic() - began)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._over.set()
        self._thread.join(15)

    def check(self, slowest_s: float = 2.0) -> None:
        """Let it make some more calls; fail when one of its calls failed or was slow."""
        enough, until = len(self.times) + 3, time.monotonic() + 10
        while len(self.times) < enough and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert self.times
        assert not self.failures, self.failures[:3]
        assert max(self.times) < slowest_s, max(self.times)


@contextlib.contextmanager
def proxied(home: Path, script: Script = answer, **options: Any) -> Iterator[tuple[Proxy, Scripted]]:
    """Run a proxy in front of an upstream with a script; the other agent has a sound upstream of its own."""
    with Scripted(script) as upstream, Scripted() as sound:
        proxy = Proxy(home, upstream.port, sound.port, **options).start()
        try:
            yield proxy, upstream
        finally:
            proxy.end()
