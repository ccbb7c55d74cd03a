"""What an ssh-agent is asked to sign, taken apart: a login, or a document such as a commit.

A login is the blob of RFC 4252 section 7, or OpenSSH's host-bound one (PROTOCOL, section 2.6);
a document is the blob of PROTOCOL.sshsig. Whoever can have anything else signed can pass it off
as one of these, so whatever is not exactly one of them is an error. Nothing is allowed or
refused here.
"""

from __future__ import annotations

from typing import NamedTuple

from cloister.credentials.ssh_wire import Reader, WireError

PLAIN = "publickey"
HOST_BOUND = "publickey-hostbound-v00@openssh.com"
_USERAUTH_REQUEST = 50
_SERVICE = "ssh-connection"
_MAGIC = b"SSHSIG"
_HASHES = {"sha256": 32, "sha512": 64}


class Login(NamedTuple):
    """A request to be let in by public key."""

    session: bytes
    user: str
    method: str
    algorithm: str
    key: bytes
    host_key: bytes = b""
    """What the server showed, in the host-bound method."""


class Document(NamedTuple):
    """A signature over a digest, for one purpose."""

    namespace: str
    algorithm: str


def parse(data: bytes) -> Login | Document:
    """Return what is to be signed.

    Raises:
        WireError: it is neither, or has something before, in between or behind.
    """
    return _document(data[len(_MAGIC) :]) if data.startswith(_MAGIC) else _login(data)


def _login(data: bytes) -> Login:
    reader = Reader(data)
    session = reader.string()
    if reader.byte() != _USERAUTH_REQUEST:
        raise WireError("it is no request to log in")
    user = reader.string()
    service, method = reader.text(), reader.text()
    if service != _SERVICE or method not in (PLAIN, HOST_BOUND):
        raise WireError("it is no login by public key")
    if not reader.boolean():
        raise WireError("it is only a question whether a key would do, which needs no signature")
    algorithm, key = reader.text(), reader.string()
    host_key = reader.string() if method == HOST_BOUND else b""
    reader.end()
    return Login(session, user.decode("utf-8", "replace"), method, algorithm, key, host_key)


def _document(data: bytes) -> Document:
    reader = Reader(data)
    namespace, reserved, algorithm = reader.text(), reader.string(), reader.text()
    digest = reader.string()
    reader.end()
    if not namespace or reserved:
        raise WireError("a document's signature has a namespace, and nothing in the reserved field")
    if _HASHES.get(algorithm) != len(digest):
        raise WireError("a document is signed over its SHA-256 or SHA-512")
    return Document(namespace, algorithm)
