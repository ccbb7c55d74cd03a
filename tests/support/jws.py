"""JSON Web Signatures by hand: an oracle that reads tokens by RFC 7515 and `cryptography` alone, and a forger's bench.

Shares nothing with the product, so that the two can disagree.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def b64(data: bytes | str) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data.encode() if isinstance(data, str) else data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """Return what base64url stands for, however sloppily written."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def make(header: dict[str, Any] | str, payload: dict[str, Any] | str, private: Ed25519PrivateKey) -> str:
    """Return a token signed with Ed25519, whatever header and payload say; texts stand as they are."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, payload)]
    body = ".".join(b64(part) for part in parts)
    return f"{body}.{b64(private.sign(body.encode()))}"


def read_by_jwks(token: str, jwks: dict[str, Any]) -> dict[str, Any] | None:
    """Return the claims of a token that a key of the set has signed, as any verifier elsewhere would; else None."""
    head, payload, signature = token.split(".")
    header = json.loads(unb64(head))
    found = [key for key in jwks["keys"] if key["kid"] == header["kid"]]
    if header["alg"] != "EdDSA" or len(found) != 1:
        return None
    public = Ed25519PublicKey.from_public_bytes(unb64(found[0]["x"]))
    try:
        public.verify(unb64(signature), f"{head}.{payload}".encode())
    except InvalidSignature:
        return None
    return json.loads(unb64(payload))
