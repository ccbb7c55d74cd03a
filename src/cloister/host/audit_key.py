"""The Ed25519 key of an audit log's keeper: made at its first start, kept from readers, public half beside the log.

The library is imported with the first signature: a broker that keeps its user's log must not load it at its start.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cloister.errors import StepError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAME = "signing.pem"
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"


class SigningKey:
    """A private key. It is shown nowhere."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Use a key."""
        from cryptography.hazmat.primitives import serialization as form

        self._key = key
        self.public = key.public_key().public_bytes(form.Encoding.Raw, form.PublicFormat.Raw)
        """32 bytes."""
        self.pem = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key, which is nowhere yet."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())

    def private_pem(self) -> bytes:
        """Return the secret itself, for the one file that keeps it."""
        from cryptography.hazmat.primitives import serialization as form

        return self._key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())

    def sign(self, message: bytes) -> bytes:
        """Return a signature, 64 bytes."""
        return self._key.sign(message)


def open_key(directory: str) -> SigningKey:
    """Return the key that is kept in a directory; make it where there is none.

    Raises:
        StepError: `audit-key`: others could read it, or it is none.
        OSError: it cannot be read or made.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = f"{directory}/{NAME}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return make_key(directory)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise StepError("audit-key", "others could read the audit's signing key", where=path,
                            remedy=f"chmod 600 {path}")  # fmt: skip
        try:
            key = form.load_pem_private_key(file.read(), password=None)
        except ValueError:
            key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StepError("audit-key", "this is no Ed25519 key", where=path)
    return SigningKey(key)


def make_key(directory: str) -> SigningKey:
    """Make a key and keep it.

    Raises:
        OSError: it cannot be written.
    """
    key = SigningKey.generate()
    store_key(directory, key)
    return key


def store_key(directory: str, key: SigningKey) -> None:
    """Put a key in the place of the one that is there, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    fresh, path = f"{directory}/{NAME}.new", f"{directory}/{NAME}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_pem())
        file.flush()
        os.fsync(descriptor)
    os.rename(fresh, path)


def read_keys(path: str) -> list[bytes]:
    """Return the Ed25519 public keys of a PEM file, 32 bytes each, in order.

    Raises:
        StepError: `audit-key`: there is none in it.
        OSError: it cannot be read.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 20)
    keys: list[bytes] = []
    for part in text.split(_BEGIN)[1:]:
        pem = f"{_BEGIN}{part.partition(_END)[0]}{_END}\n"
        try:
            key = form.load_pem_public_key(pem.encode())
        except ValueError:
            continue
        if isinstance(key, Ed25519PublicKey):
            keys.append(key.public_bytes(form.Encoding.Raw, form.PublicFormat.Raw))
    if not keys:
        raise StepError("audit-key", "there is no Ed25519 public key in this file", where=path)
    return keys


def check(public: bytes, signature: bytes, message: bytes) -> bool:
    """Say whether a signature is right."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
