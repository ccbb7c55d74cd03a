"""A model provider on 127.0.0.1 that needs no key and no internet: what the real agents talk to in tests and demo.

`FakeModel` serves in a thread of the caller; `python -m support.fake_model` serves alone and
prints its address. Replies come from `model_wire`; every request is recorded, in memory and
(if asked) as one JSON line, so that a test can assert what left the sandbox. It speaks HTTP/1.1
with keep-alive, streams with chunked encoding, and checks no key. Not hardened: for tests only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from support import model_wire
from support.model_wire import Answer, Event, Json, Run, Say

DEFAULT_SCRIPT: tuple[Answer, ...] = (Say("FAKE-OK"),)
MODEL = "fake-1"
MAX_BODY = 64 * 1024 * 1024
PROTOCOLS = {
    "/v1/messages": model_wire.anthropic,
    "/v1/chat/completions": model_wire.chat,
    "/v1/responses": model_wire.responses,
}


@dataclass(frozen=True)
class Request:
    """One request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: Json = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model that was asked for; empty for requests that name none."""
        return str(self.body.get("model", ""))

    @property
    def tool_results(self) -> list[str]:
        """What the commands printed that the agent has run so far."""
        return model_wire.tool_results(self.body)

    def as_json(self) -> Json:
        """Return the line written to the log: everything but the prompt."""
        return {
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "model": self.model,
            "stream": bool(self.body.get("stream")),
            "body_keys": sorted(self.body),
            "tools": model_wire.tool_names(self.body),
            "tool_results": self.tool_results,
        }


class FakeModel:
    """The server. Use as a context manager: it listens from construction, serves inside `with`, and is gone after.

    Args:
        script: the answers, in order; the last one repeats.
        host: address to bind, 127.0.0.1 unless a test made a namespace of its own.
        port: 0 picks a free one.
        log: file to which each request is appended as a JSON line.
        pace_s: seconds between two events of a stream.
    """

    def __init__(
        self,
        script: Sequence[Answer] = DEFAULT_SCRIPT,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        log: Path | None = None,
        pace_s: float = 0.0,
    ) -> None:
        self.script = tuple(script)
        self.pace_s = pace_s
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._log: TextIO | None = log.open("a", encoding="utf-8") if log else None
        self._server = _Server((host, port), _Handler)
        self._server.model = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The base address, without a path."""
        return f"http://{self._server.server_address[0]!s}:{self.port}"

    @property
    def tool_results(self) -> list[str]:
        """What the agent's commands printed, from the request that tells most."""
        with self._lock:
            return max((request.tool_results for request in self.requests), key=len, default=[])

    def record(self, request: Request) -> None:
        """Keep a request; called from the connection's thread."""
        with self._lock:
            self.requests.append(request)
            if self._log:
                self._log.write(json.dumps(request.as_json()) + "\n")
                self._log.flush()

    def __enter__(self) -> Self:
        """Begin to serve."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop serving and release the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self._log:
            self._log.close()


class _Server(ThreadingHTTPServer):
    """Carries the model to the handlers; connections end with the process."""

    daemon_threads = True
    block_on_close = False
    model: FakeModel


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name is the base class's)
        """Say nothing: the record is the log."""

    def do_HEAD(self) -> None:
        """Answer the reachability check of Claude Code."""
        self._record({})
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        """List the one model."""
        self._record({})
        entry = {"id": MODEL, "object": "model", "type": "model", "display_name": "Fake", "created": 1_700_000_000}
        if self.path.partition("?")[0].endswith("/models"):
            self._send_json({"object": "list", "data": [entry], "has_more": False})
        else:
            self._not_found()

    def do_POST(self) -> None:
        """Answer a model request with what the script has for it."""
        try:
            body = json.loads(self._read_body() or b"{}")
        except ValueError:
            self._record({})
            self._send_json({"error": {"type": "invalid_request_error", "message": "not JSON"}}, status=400)
            return
        body = body if isinstance(body, dict) else {}
        self._record(body)
        path = self.path.partition("?")[0]
        if path.endswith("/count_tokens"):
            self._send_json({"input_tokens": model_wire.INPUT_TOKENS})
            return
        protocol = next((found for end, found in PROTOCOLS.items() if path.endswith(end.removeprefix("/v1"))), None)
        if protocol is None:
            self._not_found()
            return
        whole, events = protocol(str(body.get("model", MODEL)), model_wire.due(self.server.model.script, body))
        if body.get("stream"):
            self._send_events(events)
        else:
            self._send_json(whole)

    def _record(self, body: Json) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.model.record(Request(self.command, self.path, headers, body))

    def _read_body(self) -> bytes:
        """Read a body of known length or in chunks (RFC 9112 section 7.1); at most MAX_BODY bytes."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            length = int(self.headers.get("content-length") or 0)
            if length > MAX_BODY:
                raise ValueError("body too large")
            return self.rfile.read(length)
        parts: list[bytes] = []
        while size := int(self.rfile.readline(64).partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline(4)
            if sum(map(len, parts)) > MAX_BODY:
                raise ValueError("body too large")
        while self.rfile.readline(65536).strip():
            pass  # trailer fields
        return b"".join(parts)

    def _not_found(self) -> None:
        self._send_json({"error": {"type": "not_found_error", "message": f"no {self.path} here"}}, status=404)

    def _send_json(self, value: Json, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_events(self, events: Iterable[Event]) -> None:
        """Stream server-sent events, each in a chunk of its own; a client that leaves is no error."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("cache-control", "no-cache")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for name, data in events:
                head = f"event: {name}\n" if name else ""
                text = data if isinstance(data, str) else json.dumps(data)
                block = f"{head}data: {text}\n\n".encode()
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
                self.wfile.flush()
                time.sleep(self.server.model.pace_s)
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def main() -> None:
    """Serve until SIGINT or SIGTERM; print the base address on the first line of standard output."""
    parser = argparse.ArgumentParser(prog="python -m support.fake_model", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, help="append each request as a JSON line")
    parser.add_argument("--run", action="append", default=[], help="first ask the agent to run this; may be repeated")
    parser.add_argument("--say", default="FAKE-OK", help="the text that ends the turn")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two events of a stream")
    parser.add_argument("--ready-fd", type=int, help="also write the address to this descriptor, then close it")
    chosen = parser.parse_args()
    script = (*map(Run, chosen.run), Say(chosen.say))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with FakeModel(script, host=chosen.host, port=chosen.port, log=chosen.log, pace_s=chosen.pace) as model:
        print(model.url, flush=True)  # noqa: T201  (its output is its interface)
        if chosen.ready_fd is not None:
            with os.fdopen(chosen.ready_fd, "w") as ready:
                ready.write(model.url + "\n")
        try:
            signal.pause()
        except KeyboardInterrupt:
            sys.exit(0)


if __name__ == "__main__":
    main()
