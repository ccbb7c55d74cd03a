"""The form in which keys rest: one JSON document, private parts sealed with AES-256-GCM, the whole under a MAC.

    master key ──HKDF-SHA256, one per purpose──▶ keys for sealing, for the MAC, for the check value

Every private part is sealed on its own, bound to what it is for by its associated data
`purpose|agent|kid|version`, under a fresh random 96-bit nonce (NIST SP 800-38D, section 8.2.2).
The MAC (HMAC-SHA256) covers the rest as well, so that neither a revocation nor a date can be
edited. What it cannot see is the whole document replaced by an older one of the same master key.

Bytes in, values out. Files and where the master key comes from are for `host/key_store.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import DeniedError
from cloister.identity.keys import AgentKey, Seed
from cloister.identity.state import Revoked, State

FORMAT = 1
MASTER_BYTES = 32
_NONCE_BYTES = 12
_SALT = b"cloister identity store 1"
_REMEDY = "restore the identity directory from a backup, or move it away: every agent then gets new keys"


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One private part at rest."""

    nonce: bytes
    box: bytes


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state, its private parts sealed."""

    generation: int
    trust_domain: str
    issuer: str
    keys: tuple[AgentKey, ...]
    seeds: dict[str, _Sealed]
    purposes: dict[str, _Sealed]
    revoked: tuple[Revoked, ...]
    epochs: dict[str, int]
    seen: int


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands in the file."""

    format: int
    check: bytes
    """Tells a wrong master key from a damaged file."""
    mac: bytes
    body: msgspec.Raw


def subkey(master: bytes, purpose: str) -> bytes:
    """Return 32 bytes for one purpose (RFC 5869); keys for two purposes tell nothing about each other.

    Raises:
        ValueError: the master key has not 32 bytes.
    """
    if len(master) != MASTER_BYTES:
        raise ValueError("a master key has 32 bytes")
    return HKDF(algorithm=SHA256(), length=32, salt=_SALT, info=purpose.encode()).derive(master)


def opens(document: bytes, master: bytes) -> bool:
    """Say whether a document was sealed under this master key.

    Raises:
        DeniedError: it is no document.
    """
    return hmac.compare_digest(_decode(document).check, subkey(master, "check"))


def seal(state: State, master: bytes) -> bytes:
    """Return the document that keeps a state. Every nonce in it is new."""
    signing, purpose = subkey(master, "agent-keys"), subkey(master, "purpose-keys")
    versions = {key.kid: key for key in state.keys}
    body = _Body(
        generation=state.generation,
        trust_domain=state.trust_domain,
        issuer=state.issuer,
        keys=state.keys,
        seeds={kid: _seal(signing, seed, _bound(versions[kid])) for kid, seed in state.seeds.items()},
        purposes={name: _seal(purpose, seed, _bound_purpose(name)) for name, seed in state.purposes.items()},
        revoked=state.revoked,
        epochs=state.epochs,
        seen=state.seen,
    )
    encoded = msgspec.json.encode(body)
    document = _Document(
        format=FORMAT, check=subkey(master, "check"), mac=_mac(master, encoded), body=msgspec.Raw(encoded)
    )
    return msgspec.json.encode(document) + b"\n"


def unseal(document: bytes, master: bytes) -> State:
    """Return the state that a document keeps.

    Raises:
        DeniedError: the master key is another one, or the document was changed or cut off.
    """
    found = _decode(document)
    if not hmac.compare_digest(found.check, subkey(master, "check")):
        raise DeniedError("master-key-wrong", "the master key is not the one this key store was sealed with")
    raw = bytes(found.body)
    if not hmac.compare_digest(found.mac, _mac(master, raw)):
        raise _damaged()
    signing, purpose = subkey(master, "agent-keys"), subkey(master, "purpose-keys")
    try:
        body = msgspec.json.decode(raw, type=_Body)
        keys = {key.kid: key for key in body.keys}
        seeds = {kid: _open(signing, box, _bound(keys[kid])) for kid, box in body.seeds.items()}
        purposes = {name: _open(purpose, box, _bound_purpose(name)) for name, box in body.purposes.items()}
    except (msgspec.MsgspecError, InvalidTag, KeyError, ValueError):
        raise _damaged() from None
    return State(
        generation=body.generation, trust_domain=body.trust_domain, issuer=body.issuer, keys=body.keys, seeds=seeds,
        purposes=purposes, revoked=body.revoked, epochs=body.epochs, seen=body.seen,
    )  # fmt: skip


def parse_master(text: str) -> bytes | None:
    """Return a master key written as 64 hexadecimal digits, or None when the text is none."""
    stripped = text.strip()
    if len(stripped) != 2 * MASTER_BYTES or not stripped.isascii() or not stripped.isalnum():
        return None
    try:
        return bytes.fromhex(stripped)
    except ValueError:
        return None


def _decode(document: bytes) -> _Document:
    try:
        found = msgspec.json.decode(document, type=_Document)
    except msgspec.MsgspecError:
        raise _damaged() from None
    if found.format != FORMAT:
        raise DeniedError("key-store-format", f"the key store has format {found.format}, this version knows {FORMAT}",
                          remedy="use the version of Cloister that wrote it")  # fmt: skip
    return found


def _damaged() -> DeniedError:
    return DeniedError("key-store-damaged", "the key store was changed, cut off, or is none", remedy=_REMEDY)


def _mac(master: bytes, body: bytes) -> bytes:
    return hmac.new(subkey(master, "document-mac"), body, hashlib.sha256).digest()


def _bound(key: AgentKey) -> bytes:
    """Return the associated data of an agent's key."""
    return f"agent-keys|{key.agent}|{key.kid}|{key.version}".encode()


def _bound_purpose(name: str) -> bytes:
    return f"purpose-keys|{name}||1".encode()


def _seal(key: bytes, seed: Seed, bound: bytes) -> _Sealed:
    nonce = os.urandom(_NONCE_BYTES)
    return _Sealed(nonce, AESGCM(key).encrypt(nonce, seed.value, bound))


def _open(key: bytes, sealed: _Sealed, bound: bytes) -> Seed:
    return Seed(AESGCM(key).decrypt(sealed.nonce, sealed.box, bound))
