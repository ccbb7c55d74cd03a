"""Where the master key comes from: the environment, a file, a systemd credential, or our own directory.

The first that is *named* counts; when it cannot be had, that is an error, and never a reason to
take the next: a store would otherwise be sealed with a key nobody meant. Text only; that it is
64 hexadecimal digits is for `identity/vault.py`.

    1. CLOISTER_MASTER_KEY             the key itself
    2. CLOISTER_MASTER_KEY_PATH        a file: ours or root's, mode 0600 or less, no link
    3. $CREDENTIALS_DIRECTORY/cloister-master-key    systemd.exec(5), LoadCredential=; with
                                       LoadCredentialEncrypted= it is sealed to the host or its TPM
    4. master.key in the store's directory, generated with the store
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from cloister.errors import DeniedError
from cloister.host.key_store import MASTER, read_private

KEY = "CLOISTER_MASTER_KEY"
KEY_PATH = "CLOISTER_MASTER_KEY_PATH"
CREDENTIAL = "cloister-master-key"
_MAX_BYTES = 4096


class Source(NamedTuple):
    """Where the master key is kept. `path` is empty for the environment."""

    what: str
    path: str
    ours: bool
    """Whether we may put another key in its place."""
    generated: bool = False


def find_source(environ: Mapping[str, str], directory: str) -> Source:
    """Return where the master key of the store in `directory` comes from; nothing is read yet."""
    if environ.get(KEY):
        return Source(KEY, "", ours=False)
    if environ.get(KEY_PATH):
        return Source(KEY_PATH, environ[KEY_PATH], ours=True)
    credentials = environ.get("CREDENTIALS_DIRECTORY", "")
    if credentials and os.path.lexists(f"{credentials}/{CREDENTIAL}"):
        return Source("systemd credential", f"{credentials}/{CREDENTIAL}", ours=False)
    return Source("generated", f"{directory}/{MASTER}", ours=True, generated=True)


def read_master(source: Source, environ: Mapping[str, str]) -> str | None:
    """Return the text of the master key, or None where its file is missing.

    Raises:
        DeniedError: the file is not safe, or no text.
    """
    if not source.path:
        return environ[KEY]
    if source.what == "systemd credential":
        return _read_credential(source.path)
    return as_text(read_private(source.path), source.path)


def as_text(data: bytes | None, path: str) -> str | None:
    """Return a key file's content as text.

    Raises:
        DeniedError: it is no ASCII text.
    """
    try:
        return None if data is None else data.decode("ascii")
    except UnicodeDecodeError:
        raise DeniedError("master-key-invalid", "a master key is 64 hexadecimal digits", where=path) from None


def _read_credential(path: str) -> str | None:
    """Read a credential. systemd guards the directory; the file's mode depends on its version and on ACLs."""
    try:
        with open(path, "rb") as file:
            return as_text(file.read(_MAX_BYTES), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeniedError(
            "master-key-unreadable", f"the credential cannot be read: {error.strerror}", where=path
        ) from error
