"""SSH keys, signatures and messages made in memory, as a client, a server and an agent would. Touches no machine."""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cloister.credentials.ssh_wire import Reader, string

SESSION = bytes(range(32))


def number(value: int) -> bytes:
    """Return an `mpint`."""
    return string(value.to_bytes(value.bit_length() // 8 + 1, "big") if value else b"")


class Key(NamedTuple):
    """A key pair. `private` is a key of `cryptography`."""

    blob: bytes
    private: object

    def sign(self, data: bytes) -> bytes:
        """Sign as SSH does: with the strongest algorithm of the key's kind."""
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return string(b"ssh-ed25519") + string(self.private.sign(data))
        if isinstance(self.private, rsa.RSAPrivateKey):
            made = self.private.sign(data, padding.PKCS1v15(), hashes.SHA512())
            return string(b"rsa-sha2-512") + string(made)
        assert isinstance(self.private, ec.EllipticCurvePrivateKey)
        first, second = decode_dss_signature(self.private.sign(data, ec.ECDSA(hashes.SHA256())))
        return string(b"ecdsa-sha2-nistp256") + string(number(first) + number(second))


def make_ed25519(seed: int = 1) -> Key:
    """Make the same key for the same seed."""
    private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    return Key(string(b"ssh-ed25519") + string(private.public_key().public_bytes_raw()), private)


def make_ecdsa() -> Key:
    """Make a key on the curve P-256."""
    private = ec.derive_private_key(12345678901234567890, ec.SECP256R1())
    numbers = private.public_key().public_numbers()
    point = b"\4" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    return Key(string(b"ecdsa-sha2-nistp256") + string(b"nistp256") + string(point), private)


def make_rsa(bits: int = 2048) -> Key:
    """Make a key; a new one each time."""
    private = rsa.generate_private_key(65537, bits)
    numbers = private.public_key().public_numbers()
    return Key(string(b"ssh-rsa") + number(numbers.e) + number(numbers.n), private)


def bind(host: Key, session: bytes = SESSION, *, signature: bytes | None = None, forwarding: int = 0) -> bytes:
    """Return session-bind@openssh.com."""
    made = host.sign(session) if signature is None else signature
    body = string(host.blob) + string(session) + string(made) + bytes([forwarding])
    return b"\x1b" + string(b"session-bind@openssh.com") + body


def login(key: Key, session: bytes = SESSION, *, host: Key | None = None, algorithm: bytes = b"ssh-ed25519") -> bytes:
    """Return the blob of a login as `git`; host-bound with a host."""
    method = b"publickey-hostbound-v00@openssh.com" if host else b"publickey"
    blob = string(session) + b"\x32" + string(b"git") + string(b"ssh-connection") + string(method)
    blob += b"\x01" + string(algorithm) + string(key.blob)
    return blob + (string(host.blob) if host else b"")


def document(namespace: bytes = b"git", digest: bytes = bytes(64), algorithm: bytes = b"sha512") -> bytes:
    """Return an SSHSIG blob."""
    return b"SSHSIG" + string(namespace) + string(b"") + string(algorithm) + string(digest)


def sign_request(key: Key, data: bytes, flags: int = 0) -> bytes:
    """Return a request to sign."""
    return b"\x0d" + string(key.blob) + string(data) + flags.to_bytes(4, "big")


def listed(*keys: Key) -> bytes:
    """Return an agent's list of keys, with comments that tell much."""
    entries = b"".join(string(key.blob) + string(b"alice@secret-laptop") for key in keys)
    return b"\x0c" + len(keys).to_bytes(4, "big") + entries


def certify(  # noqa: PLR0913  # the fields of a certificate
    host: Key,
    authority: Key,
    principals: tuple[bytes, ...] = (b"git.example.org",),
    after: int = 0,
    before: int = 2**64 - 1,
    *,
    kind: int = 2,
    critical: bytes = b"",
) -> Key:
    """Return a key whose blob is a certificate for it; it signs as before."""
    reader = Reader(host.blob)
    name = reader.text().encode()
    body = string(name + b"-cert-v01@openssh.com") + string(bytes(32)) + host.blob[reader.position :]
    body += bytes(8) + kind.to_bytes(4, "big") + string(b"made-up") + string(b"".join(map(string, principals)))
    body += after.to_bytes(8, "big") + before.to_bytes(8, "big") + string(critical) + string(b"") + string(b"")
    body += string(authority.blob)
    return Key(body + string(authority.sign(body)), host.private)
