"""The export to a collector of OpenTelemetry: a receiver that takes requests by the published protobuf schema only.

No collector is to be had from PyPI, Debian or npm, so this is a stand-in with the schema of `opentelemetry-proto`.
"""

from __future__ import annotations

import http.server
import socket
import threading
import time

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from cloister.audit.chain import encode
from cloister.audit.kinds import kinds
from cloister.host.audit_log import Log
from cloister.host.audit_syslog import Trust
from cloister.runs.audit_export import Export, here
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.audit_targets import OtlpTarget
from support.audit_samples import full
from support.secure_server import TestAuthority

pytestmark = pytest.mark.kernel


class Collector(http.server.ThreadingHTTPServer):
    """Takes what the schema takes, and answers as it is told."""

    daemon_threads = True

    def __init__(self, context=None, port=0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answers: list[tuple[int, dict, bytes]] = []
        self.records: list = []
        self.requests = 0
        self.unwanted = ""
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "https" if context else "http"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{self.scheme}://localhost:{self.server_address[1]}"

    def numbers(self) -> list[int]:
        """Return the numbers of the events it has taken."""
        return [next(a.value.int_value for a in one.attributes if a.key == "cloister.seq") for one in self.records]

    def handle_error(self, request, client_address) -> None:
        """Say nothing: a client that trusts nobody here is what some tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):  # the name that http.server calls
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.requests += 1
        status, headers, text = server.answers.pop(0) if server.answers else (200, {}, b"{}")
        if (self.path, self.headers["Content-Type"]) != ("/v1/logs", "application/json"):
            status = 404
        elif status == 200:
            found = json_format.Parse(body, ExportLogsServiceRequest())
            logs = [log for part in found.resource_logs for scope in part.scope_logs for log in scope.log_records]
            if server.unwanted and any(server.unwanted in log.body.string_value for log in logs):
                status = 400
            else:
                server.records += logs
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def keeper(tmp_path):
    """Give a keeper of a log."""
    made = Keeper(Log(str(tmp_path / "audit")), str(tmp_path / "key"), Rules())
    made.open()
    yield made
    made.close()


def _export(tmp_path, url, trust=None):
    (tmp_path / "cursors").mkdir(exist_ok=True)
    target = OtlpTarget(url, trust or Trust())
    return Export(str(tmp_path / "audit"), str(tmp_path / "cursors"), url, target, here())


def _turn(export, until, timeout_s=20.0):
    """Let it work until something holds; waits are cut short."""
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, export.news
        time.sleep(min(0.05, export.turn(time.monotonic())))


@pytest.mark.parametrize("secure", [False, True])
def test_every_kind_is_taken(tmp_path, keeper, secure):
    """A collector takes an event of every kind, by HTTP and by HTTPS with a verified certificate, once and in order."""
    authority = TestAuthority(tmp_path / "ca")
    keeper.put([encode(full(kind)) for kind in kinds()])
    server = Collector(authority.context("localhost") if secure else None)
    export = _export(tmp_path, server.url, Trust(str(authority.file)))
    _turn(export, lambda: export.arrived == keeper.seq)
    export.close()
    server.shutdown()
    assert server.numbers() == list(range(1, keeper.seq + 1))


def test_a_collector_with_a_wrong_certificate_gets_nothing(tmp_path, keeper):
    """A collector whose certificate is another authority's gets no request."""
    keeper.put([encode(full("file.opened"))])
    server = Collector(TestAuthority(tmp_path / "ca").context("localhost"))
    export = _export(tmp_path, server.url, Trust(str(TestAuthority(tmp_path / "other").file)))
    _turn(export, lambda: bool(export.news))
    server.shutdown()
    assert "certificate verify failed" in export.news[0]
    assert (server.requests, export.arrived) == (0, 0)


def test_nothing_is_lost_while_a_collector_is_away(tmp_path, keeper):
    """Busy answers, a collector that is not there, and a restart of ours: each event is taken, and none is left out."""
    keeper.put([encode(full("file.opened")) for _ in range(1200)])
    server = Collector()
    server.answers = [
        (200, {}, b"{}"),
        (503, {"Retry-After": "0"}, b""),
        (429, {}, b""),
        (401, {}, b""),
        (200, {}, b""),
    ]
    export = _export(tmp_path, server.url)
    _turn(export, lambda: export.arrived >= 1000)
    port = server.server_address[1]
    server.shutdown()
    server.server_close()
    export.turn(time.monotonic())
    export.close()
    first = server.numbers()
    keeper.put([encode(full("file.opened")) for _ in range(300)])
    again = Collector(port=port)
    export = _export(tmp_path, again.url)
    _turn(export, lambda: export.arrived == keeper.seq)
    again.shutdown()
    assert set(first) | set(again.numbers()) == set(range(1, keeper.seq + 1))
    assert again.numbers()[0] > 500, "what had arrived was sent again"


def test_one_event_that_is_refused_does_not_hold_up_the_others(tmp_path, keeper):
    """An event that a collector will never take is left out alone, and said with its number."""
    keeper.put([encode(full("file.opened", message="poison" if n == 70 else "fine")) for n in range(200)])
    server = Collector()
    server.unwanted = "poison"
    export = _export(tmp_path, server.url)
    _turn(export, lambda: export.arrived == keeper.seq)
    server.shutdown()
    missing = set(range(1, keeper.seq + 1)) - set(server.numbers())
    assert len(missing) == 1
    assert any(f"event {missing.pop()} was refused" in word for word in export.news)


def test_a_partial_success_is_told(tmp_path, keeper):
    """What a collector says of records that it left out is told, and not sent again."""
    keeper.put([encode(full("file.opened"))])
    server = Collector()
    server.answers = [(200, {}, b'{"partialSuccess":{"rejectedLogRecords":"1","errorMessage":"too old"}}')]
    export = _export(tmp_path, server.url)
    _turn(export, lambda: export.arrived == keeper.seq)
    server.shutdown()
    assert server.requests == 1
    assert any("1 records were rejected: too old" in word for word in export.news)


def test_an_answer_that_is_no_http_is_trouble(tmp_path, keeper):
    """A server that speaks something else is not taken for a collector, and is tried again."""
    keeper.put([encode(full("file.opened"))])
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"220 mail.example.org ESMTP\r\n")
        connection.close()

    threading.Thread(target=answer, daemon=True).start()
    export = _export(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}")
    _turn(export, lambda: bool(export.news))
    listener.close()
    assert "no answer that is HTTP" in export.news[0]
    assert export.arrived == 0
