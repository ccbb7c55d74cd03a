"""Agents' signing keys: Ed25519 (RFC 8032), named by their own thumbprint, and what others see of them.

A key's `kid` is the RFC 7638 thumbprint of its public part, so a name can never be given to
another key. The private part lives as long as the key signs; a retired key keeps its public
part only, for tokens that are still out. Storing keys is for `vault`.
"""

from __future__ import annotations

import base64
import hashlib

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class AgentKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key of one agent. Times are whole seconds since the epoch."""

    agent: str
    kid: str
    public: bytes
    """32 bytes (RFC 8032, section 5.1.5)."""
    created: int
    retired: int = 0
    """When the next key took over; 0 while it signs."""
    version: int = 1
    """Counts the agent's keys; part of what the encryption is bound to."""

    @property
    def signs(self) -> bool:
        """Whether new tokens are signed with it."""
        return not self.retired

    def jwk(self) -> dict[str, str]:
        """Return the public part as a JSON Web Key (RFC 8037, section 2)."""
        return {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": encode64(self.public),
            "kid": self.kid,
            "use": "sig",
            "alg": "EdDSA",
        }


class Seed(msgspec.Struct, frozen=True):
    """A private part. Its `repr` and `str` show nothing."""

    value: bytes

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return "Seed(...)"


def make_key(agent: str, now: int, version: int) -> tuple[AgentKey, Seed]:
    """Return a new key of an agent, and its private part."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    return (
        AgentKey(agent=agent, kid=thumbprint(public), public=public, created=now, version=version),
        Seed(private.private_bytes_raw()),
    )


def thumbprint(public: bytes) -> str:
    """Return the RFC 7638 thumbprint of an Ed25519 key (RFC 8037, appendix A.3)."""
    text = f'{{"crv":"Ed25519","kty":"OKP","x":"{encode64(public)}"}}'
    return encode64(hashlib.sha256(text.encode()).digest())


def encode64(data: bytes) -> str:
    """Return base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode64(text: str) -> bytes | None:
    """Return what base64url text stands for, or None when it is not the one spelling of anything (RFC 4648, 3.5)."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
    return data if encode64(data) == text else None
