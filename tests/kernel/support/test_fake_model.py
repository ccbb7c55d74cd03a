"""The fake provider over a real socket: keep-alive, streams, chunked requests, and the record."""

import http.client
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_model import FakeModel

pytestmark = pytest.mark.kernel


def _connect(model: FakeModel) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", model.port, timeout=10)


def test_one_connection_carries_many_requests(fake_model: FakeModel) -> None:
    """Whole replies, streams and errors leave the connection usable."""
    connection = _connect(fake_model)
    statuses = []
    for method, path, body in [
        ("POST", "/v1/messages", {"model": "m"}),
        ("POST", "/v1/messages?beta=true", {"model": "m", "stream": True}),
        ("GET", "/v1/models", None),
        ("POST", "/nowhere", {}),
        ("HEAD", "/", None),
        ("POST", "/v1/responses", {"stream": True}),
    ]:
        connection.request(method, path, body=json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        statuses.append(response.status)
        text = response.read().decode()
        if path.startswith(("/v1/messages", "/v1/responses")):
            assert "FAKE-OK" in text

    assert statuses == [200, 200, 200, 404, 200, 200]
    assert fake_model.requests[0].model == "m"


def test_chunked_requests_are_understood(fake_model: FakeModel) -> None:
    """A request body in chunks is read to its end."""
    connection = _connect(fake_model)
    connection.request("POST", "/v1/chat/completions", body=iter([b'{"model":', b' "x"}']), encode_chunked=True)

    assert connection.getresponse().status == 200
    assert fake_model.requests[-1].model == "x"


def test_what_is_not_json_is_refused_and_recorded(fake_model: FakeModel) -> None:
    """A body that is no JSON gets 400 and still counts as a request: an attacker's server must see everything."""
    connection = _connect(fake_model)
    connection.request("POST", "/", body="a stolen file")

    assert connection.getresponse().status == 400
    assert [request.method for request in fake_model.requests] == ["POST"]


def test_a_client_that_leaves_harms_nobody(fake_model: FakeModel) -> None:
    """A stream whose reader goes away does not disturb the next request."""
    fake_model.pace_s = 0.05
    with socket.create_connection(("127.0.0.1", fake_model.port)) as gone:
        gone.sendall(b'POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"stream":true}')
        gone.recv(10)
    connection = _connect(fake_model)
    connection.request("GET", "/v1/models")

    assert connection.getresponse().status == 200


def test_the_program_prints_its_address_and_logs(tmp_path: Path) -> None:
    """`python -m support.fake_model` says where it listens, logs requests without prompts, and ends on SIGTERM."""
    log = tmp_path / "log.jsonl"
    argv = [sys.executable, "-m", "support.fake_model", "--log", str(log), "--say", "hello"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip().removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("POST", "/v1/messages", body='{"messages": [{"role": "user", "content": "a secret"}]}')
        answer = connection.getresponse().read().decode()
        process.terminate()

        assert process.wait(10) == 0
    assert "hello" in answer
    assert json.loads(log.read_text())["path"] == "/v1/messages"
    assert "a secret" not in log.read_text()
