"""The key that signs a user's images: a private file, with a passphrase if wanted, and its public line beside it.

The library is imported with the first signature or check.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister.errors import DeniedError, StepError, UsageError
from cloister.host import private_files
from cloister.images.trust import TrustedKey, key_line, parse_keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PRIVATE = "image-key.pem"
MAX_FILES = 1000

AskPassphrase = Callable[[], bytes]
"""Called when a key turns out to have a passphrase."""


class ImageKey:
    """A private key. It is shown nowhere."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Use a key."""
        from cryptography.hazmat.primitives import serialization as form

        self._key = key
        self.public = key.public_key().public_bytes(form.Encoding.Raw, form.PublicFormat.Raw).hex()

    def sign(self, message: bytes) -> bytes:
        """Return a signature, 64 bytes."""
        return self._key.sign(message)

    def pem(self, passphrase: bytes) -> bytes:
        """Return the secret for the one file that keeps it; encrypted (PKCS #8, scrypt) with a passphrase."""
        from cryptography.hazmat.primitives import serialization as form

        how: form.KeySerializationEncryption = form.NoEncryption()
        if passphrase:
            how = form.BestAvailableEncryption(passphrase)
        return self._key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how)


def generate(path: str, *, passphrase: bytes = b"", comment: str = "") -> str:
    """Make a key; return its public line.

    Raises:
        StepError: `image-key-exists`: there is one already, which images are signed with.
        OSError: it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    directory = os.path.dirname(path)
    with private_files.locked(directory):
        if os.path.lexists(path):
            raise StepError("image-key-exists", "there is a key already, and images may be signed with it", where=path,
                            remedy=f"cloister image keygen --key {path}.2")  # fmt: skip
        key = ImageKey(Ed25519PrivateKey.generate())
        private_files.replace(path, key.pem(passphrase))
        line = key_line(key.public, comment=comment)
        private_files.replace(f"{path}.pub", line.encode())
    return line


def load(path: str, ask: AskPassphrase | None = None) -> ImageKey:
    """Return the key of a file.

    Raises:
        UsageError: `image-key-missing`: there is none.
        DeniedError: `image-key`: others could read it, it is no Ed25519 key, or its passphrase is wrong.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not os.path.lexists(path):
        raise UsageError("image-key-missing", "there is no key to sign images with", where=path,
                         remedy="cloister image keygen")  # fmt: skip
    data = private_files.read(path)
    if data is None:
        raise DeniedError(
            "image-key", "others than you could read or write the key", where=path, remedy=f"chmod 600 {path}"
        )
    encrypted = b"ENCRYPTED" in data
    if encrypted and ask is None:
        raise DeniedError("image-key", "the key has a passphrase, and nobody is there to ask", where=path)
    try:
        key = form.load_pem_private_key(data, ask() if encrypted and ask else None)
    except (ValueError, TypeError):
        raise DeniedError("image-key", "the key cannot be opened: wrong passphrase, or no key", where=path) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DeniedError("image-key", "this is no Ed25519 key", where=path)
    return ImageKey(key)


def trust_store(directory: str, owners: frozenset[int]) -> list[TrustedKey]:
    """Return the keys of all `*.pub` files of a directory, in the order of their names; none where there is none.

    Raises:
        DeniedError: `image-trust-file`: directory or file belong to somebody else or may be written by others, a
            file is no plain one, or a line is not understood. All is refused then: which key was meant is not known.
    """
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _untrusted(directory, error.strerror or "it cannot be opened") from error
    try:
        _check_owner(os.fstat(handle), owners, directory)
        names = sorted(name for name in os.listdir(handle) if name.endswith(".pub") and not name.startswith("."))
        if len(names) > MAX_FILES:
            raise _untrusted(directory, "it has too many files")
        found: list[TrustedKey] = []
        for name in names:
            path = f"{directory}/{name}"
            try:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
            except OSError as error:
                raise _untrusted(path, error.strerror or "it cannot be opened") from error
            with os.fdopen(file, "rb") as opened:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise _untrusted(path, "it is no plain file")
                _check_owner(os.fstat(opened.fileno()), owners, path)
                found += parse_keys(opened.read(1 << 16).decode("utf-8", "replace"), path)
        return found
    finally:
        os.close(handle)


def _check_owner(info: os.stat_result, owners: frozenset[int], path: str) -> None:
    if info.st_uid not in owners or info.st_mode & 0o022:
        raise _untrusted(path, "others may write it")


def _untrusted(path: str, why: str) -> DeniedError:
    return DeniedError("image-trust-file", f"the trust store cannot be believed: {why}", where=path,
                       remedy=f"chmod go-w {path}")  # fmt: skip
