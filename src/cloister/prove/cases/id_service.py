"""Ask the identity service for more than the files hold."""

import json
import os
import socket

from cloister.prove.inside.clients import must_be_refused, plain_http
from cloister.prove.inside.support import Box

ID = "id-service"
TITLE = "Ask the identity service, or its admin socket, for a token"
PROMISE = "P-169"
CLASSES = (63, 64, 69)
EXPECT = "neither the port nor the socket can be reached"
SHAPE = "any"
IF_POLICY = ("identity",)
LIFTED_BY = ("egress.allow names the identity service",)

PORT = 2082
NAMES = ("127.0.0.1", "localhost", "[::1]", "host.cloister.internal", "0.0.0.0", "2130706433")  # a target


def attack(box: Box) -> None:
    """Directly, through the proxy by name and by address, and by the paths of its sockets."""
    box.connects("127.0.0.1", "ECONNREFUSED", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", PORT))
    body = json.dumps({"run": os.environ.get("CLOISTER_RUN", ""), "audience": "vault"})
    token = ""
    try:
        with open(os.environ.get("CLOISTER_IDENTITY_TOKEN_FILE", ""), encoding="ascii") as file:
            token = file.read()
    except OSError:
        box.stopped("no token to show")
    own = [f"[{text}]" if ":" in text else text for text in box.fact("host_addresses")]
    for host in (*NAMES, *own[:4]):
        place = f"{host}:{PORT}"
        head = f"Host: {place}\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        asked = plain_http(f"POST http://{place}/v1/tokens HTTP/1.1\r\n{head}".encode())
        must_be_refused(box, f"POST {place}", asked)
        must_be_refused(
            box, f"CONNECT {place}", plain_http(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode())
        )
    for path in (*map(str, box.fact("identity_sockets")), str(box.fact("broker_socket"))):
        box.connects(path, "ENOENT ENOTDIR EACCES", socket.AF_UNIX, socket.SOCK_STREAM, path)
