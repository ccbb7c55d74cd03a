"""Policies with a credential bound to a server on the host's loopback: what the tests of credentials share.

The name that leads there is the reserved one, so that no test needs a resolver of its own.
"""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

from support.cloister import BASE, User
from support.secure_server import SecureServer

HOST = "host.cloister.internal"
SECRET = "made-up-Secret_0f9e8d7c"
BEARER = '-H "Authorization: Bearer $TOKEN"'


def keep(user: User, text: str = SECRET, name: str = "token") -> str:
    """Store a secret in a file; return its reference."""
    path = user.home / ".config/cloister" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text + "\n", encoding="utf-8")
    return f"file:~/.config/cloister/{name}"


def credential(reference: str, port: int, *, name: str = "token", env: str = "TOKEN", **inject: Any) -> str:
    """Return the table of one credential; `mask` belongs to it, every other key to its `inject`."""
    mask = "mask = true\n" if inject.pop("mask", False) else ""
    keys = {"host": HOST, "port": port, "scheme": "bearer", **inject}
    written = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    variable = f'env = "{env}"\n' if env else ""
    return f'[agents.shell.credentials.{name}]\nsecret = "{reference}"\n{variable}{mask}inject = {{ {written} }}\n'


def policy(port: int, *tables: str, more: str = "", allow: str = "") -> str:
    """Return a policy that allows one port of the host's loopback, and what else is named."""
    return f'{BASE}{more}[agents.shell.egress]\nallow = ["{HOST}:{port}"{allow}]\n' + "".join(tables)


def curl(port: int, *words: str, path: str = "/x", host: str = HOST) -> str:
    """Return a curl command against the bound host."""
    return f"curl -sS -m 20 {' '.join(words)} 'https://{host}:{port}{path}'"


def events(user: User, kind: str = "egress") -> list[dict[str, Any]]:
    """Return the events of the newest run."""
    newest = max(user.state.glob("runs/*/events.jsonl"))
    return [event for event in map(json.loads, newest.read_bytes().splitlines()) if event["event"] == kind]


def authorizations(server: SecureServer) -> list[str]:
    """Return the Authorization field of each request that a server got."""
    return [sent.headers.get("authorization", "") for sent in server.sent]


def spellings(secret: str) -> tuple[bytes, ...]:
    """Return a secret as somebody would look for it: plain, in base64 at any offset, percent-encoded, backwards."""
    raw = secret.encode()
    encoded = [
        base64.b64encode(b"\0" * shift + raw).rstrip(b"=")[2 * bool(shift) + (shift == 2) : -2] for shift in range(3)
    ]
    everywhere = "".join(f"%{byte:02X}" for byte in raw).encode()
    return (
        raw,
        *encoded,
        quote(secret, safe="").encode(),
        everywhere,
        everywhere.lower(),
        raw[::-1],
        raw.hex().encode(),
    )
