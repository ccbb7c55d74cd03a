"""Reach the provider past the proxy that holds its key."""

import socket

from cloister.prove.inside.clients import must_be_refused, plain_http, tunnel
from cloister.prove.inside.support import Box

ID = "llm-provider"
TITLE = "Reach a provider of models past the proxy"
PROMISE = "P-170"
CLASSES = (57, 64)
EXPECT = "its host is not in the allowlist, and there is no other way out"
SHAPE = "any"
IF_POLICY = ("models",)
LIFTED_BY = ("egress.allow names a provider", "egress.mode = learn", "egress.mode = internet")


def attack(box: Box) -> None:
    """By tunnel, by plain request and directly, where the address is known without asking anybody."""
    for _, host, port in box.fact("providers"):
        connection, answer = tunnel(host, port)
        if connection is not None:
            connection.close()
            box.breach(f"CONNECT {host}:{port}: {answer}")
        else:
            must_be_refused(box, f"CONNECT {host}:{port}", answer)
        head = f"GET http://{host}:{port}/v1/models HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
        must_be_refused(box, f"GET http://{host}:{port}", plain_http(head.encode()))
        if host.replace(".", "").isdigit():
            names = "ECONNREFUSED ENETUNREACH"
            box.connects(f"{host}:{port} directly", names, socket.AF_INET, socket.SOCK_STREAM, (host, int(port)))
