"""Send what stands for a secret to somebody it is not for."""

import base64
import os
from typing import Any

from cloister.prove.inside.clients import must_be_refused, placeholders, plain_http, secure, send
from cloister.prove.inside.support import Box

ID = "cred-elsewhere"
TITLE = "Send a placeholder to another host, to a wrong place at its own, or over plain HTTP"
PROMISE = "P-142"
CLASSES = (51, 65)
EXPECT = "refused before it leaves, wherever it stands"
SHAPE = "any"
IF_POLICY = ("credentials",)
LIMIT_S = 60.0


def attack(box: Box) -> None:
    """In header, Basic, query, path, escapes and body at bound hosts of others; at its own; then unencrypted."""
    for name, token in placeholders(box).items():
        own = next(one["places"] for one in box.fact("credentials") if one["name"] == name)
        others = [place for one in box.fact("credentials") for place in one["places"] if place not in own]
        for host, port in [place for index, place in enumerate(others) if place not in others[:index]][:3]:
            for what, (path, fields) in spellings(token).items():
                _try(box, f"{what} of {name} to", (host, port), path, fields)
            _body(box, f"body of {name} to {host}:{port}", (host, port), token)
        for what in ("field", "path"):
            _try(box, f"{what} of {name} to its own", (own[0][0], own[0][1]), *spellings(token)[what])
        plain = [(host, port) for host, port in own] + [rule.rsplit(":", 1) for rule in box.fact("plain_hosts")][:2]
        for host, port in plain:
            request = (
                f"GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n\r\n"
            )
            must_be_refused(box, f"{name} over plain HTTP to {host}:{port}", plain_http(request.encode()))
    if not placeholders(box):
        box.stopped("no credential has a variable, so there is no placeholder to send")


def spellings(token: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return what to send: a path, and header fields."""
    basic = base64.b64encode(f"user:{token}".encode()).decode()
    escaped = "".join(f"%{ord(char):02x}" for char in token)
    return {
        "bearer": ("/", {"Authorization": f"Bearer {token}"}),
        "basic": ("/", {"Authorization": f"Basic {basic}"}),
        "field": ("/", {"X-Cloister-Prove": token}),
        "query": (f"/?key={token}", {}),
        "escaped query": (f"/?key={escaped}", {}),
        "path": (f"/{token}", {}),
        "cookie": ("/", {"Cookie": f"a=b; key={token}"}),
    }


def _try(box: Box, what: str, place: tuple[str, int], path: str, fields: dict[str, str]) -> None:
    connection, answer = secure(*place)
    if connection is not None:
        answer = send(connection, "GET", path, _authority(*place), fields)
    must_be_refused(box, f"{what} {place[0]}:{place[1]}", answer)


def _body(box: Box, what: str, place: tuple[str, int], token: str) -> None:
    """Send it in a body: the head of such a request may have left, so the server must be there to be spoken to."""
    connection, answer = secure(*place)
    if connection is not None:
        answer = send(connection, "POST", "/", _authority(*place), {}, f'{{"text": "{token}"}}'.encode())
    if answer.undialled:
        box.stopped(f"{what}: not proved, the host does not answer")
    else:
        must_be_refused(box, what, answer)


def _authority(host: str, port: int) -> str:
    return host if port == 443 else f"{host}:{port}"


def twin(box: Box) -> None:
    """A bound host is reached by TLS that ends here, and its certificate is trusted; it is asked for its head only."""
    token_places: list[Any] = [place[:2] for place in box.fact("token_places")]
    for one in box.fact("credentials"):
        host, port = one["places"][0]
        connection, answer = secure(host, port)
        box.works(f"a tunnel to {host}:{port}: {answer}", connection is not None or answer.ours)
        if connection is None:
            box.stopped(f"egress itself refuses {host}:{port}")
            continue
        names = [value for _, value in connection.getpeercert()["subjectAltName"]]
        box.works(f"a certificate for {host} alone", names == [host])
        if [host, port] in token_places:
            connection.close()
            continue
        answer = send(connection, "HEAD", "/", _authority(host, port), {})
        if answer.undialled:
            box.stopped(f"{host}:{port} did not answer, so only its certificate is proved ({answer.reason})")
        else:
            box.works(f"an answer through TLS to {host}:{port}: {answer}", answer.status > 0)
    box.works("programs are told whom to trust", os.path.exists(os.environ.get("SSL_CERT_FILE", "")))
