"""How cases speak to what credentials and models add: TLS that ends at the broker, the port of models, agent sockets.

Runs inside the sandbox beside `support`, with the standard library only.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any, NamedTuple

from cloister.prove.inside.support import DIALLED, PROXY, Box, CannotRunError

MODELS = ("127.0.0.1", 11435)
WAIT_S = 5.0


class Answer(NamedTuple):
    """What came back."""

    status: int
    """0 for a connection that was closed without an answer."""
    reason: str
    """Ours; empty for an answer of somebody else."""
    body: bytes

    @property
    def ours(self) -> bool:
        """Whether the broker refused before anything left."""
        return not self.status or (self.status >= 400 and bool(self.reason) and self.reason not in DIALLED)  # noqa: PLR2004

    @property
    def undialled(self) -> bool:
        """Whether the broker let it pass, and the server could not be reached."""
        return self.reason in DIALLED or self.reason in ("certificate-invalid", "tls-failed")

    def __str__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return f"{self.status or 'closed'} {self.reason}".rstrip()


def trusted() -> Any:
    """Return a TLS context that trusts what the sandbox's variables say.

    Raises:
        CannotRunError: this Python has no TLS.
    """
    try:
        import ssl
    except ImportError:
        raise CannotRunError("/usr/bin/python3 has no ssl module") from None
    file = os.environ.get("SSL_CERT_FILE", "")
    return ssl.create_default_context(cafile=file or None)


def tunnel(host: str, port: int) -> tuple[socket.socket | None, Answer]:
    """Ask the proxy for a tunnel; return it, or None and the refusal."""
    connection = socket.create_connection(PROXY, timeout=WAIT_S)
    name = f"[{host}]" if ":" in host else host
    connection.sendall(f"CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n".encode())
    answer = receive(connection)
    if answer.status == 200:  # noqa: PLR2004
        return connection, answer
    connection.close()
    return None, answer


def plain_http(request: bytes) -> Answer:
    """Send a request to the proxy as it is, and return the answer; a closed connection is one of status 0."""
    with socket.create_connection(PROXY, timeout=WAIT_S) as connection:
        connection.sendall(request)
        try:
            return receive(connection)
        except ConnectionError:
            return Answer(0, "", b"")


def secure(host: str, port: int, name: str = "") -> tuple[Any, Answer]:
    """Open a tunnel and TLS in it; return the connection, or None and the refusal.

    Raises:
        OSError: the handshake failed (`ssl.SSLError` is one).
    """
    raw, answer = tunnel(host, port)
    if raw is None:
        return None, answer
    try:
        return trusted().wrap_socket(raw, server_hostname=name or host), answer
    except BaseException:
        raw.close()
        raise


def send(  # noqa: PLR0913  # the parts of a request
    connection: Any, method: str, path: str, host: str, fields: dict[str, str], body: bytes = b""
) -> Answer:
    """Send one request and return the answer; a connection that is cut is an answer of status 0."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{key}: {value}" for key, value in fields.items()]
    lines += [f"Content-Length: {len(body)}"] if body or method == "POST" else []
    try:
        connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        return receive(connection)
    except (ConnectionError, EOFError):
        return Answer(0, "", b"")
    finally:
        connection.close()


def model(method: str, path: str, fields: dict[str, str], body: object = None) -> Answer:
    """Send one request to the port of models."""
    data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body or b""
    connection = socket.create_connection(MODELS, timeout=WAIT_S)
    return send(connection, method, path, f"{MODELS[0]}:{MODELS[1]}", fields, data)


def model_route(box: Box) -> str:
    """Return a route that the agent's providers serve."""
    spoken = {protocol for protocol, _, _ in box.fact("providers")}
    return "/v1/messages" if "anthropic" in spoken else "/v1/chat/completions"


def receive(connection: Any) -> Answer:
    """Read one answer: its head, and a body as long as it says or until the end."""
    data = b""
    connection.settimeout(WAIT_S)
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return Answer(0, "", data)
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = int(fields.get("content-length", "0"))
    while len(body) < min(wanted, 1 << 20):
        chunk = connection.recv(65536)
        if not chunk:
            break
        body += chunk
    words = first.split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 999
    return Answer(status, fields.get("x-cloister-reason", ""), body)


def must_be_refused(box: Box, what: str, answer: Answer) -> None:
    """Judge an answer: only a refusal of the broker's own is one."""
    if answer.undialled:
        box.surprises.append(f"{what}: let through, but the server could not be reached ({answer.reason})")
    else:
        box.must(answer.ours, f"{what}: {answer}")


def placeholders(box: Box) -> dict[str, str]:
    """Return what stands for each credential that has a variable, by name."""
    found = {}
    for one in box.fact("credentials"):
        values = [os.environ[name] for name in one["variables"] if os.environ.get(name)]
        if values:
            found[str(one["name"])] = values[-1]
    return found
