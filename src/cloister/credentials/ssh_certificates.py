"""Certificates of SSH hosts: whether one speaks for a place (OpenSSH, PROTOCOL.certkeys).

Only what a host shows; certificates of users are not known here. Every field is read, the whole
must be signed by an authority that known_hosts names for the place, and a critical option, none of
which exists for hosts, is a reason to refuse. Facts come in: the time, authorities, revoked keys.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import NamedTuple

from cloister.credentials import ssh_keys
from cloister.credentials.ssh_known_hosts import Place, fits
from cloister.credentials.ssh_wire import Reader, WireError, string

_SUFFIX = "-cert-v01@openssh.com"
_FIELDS = {
    "ssh-ed25519": 1,
    "ssh-rsa": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
}
"""Kinds of keys, with the number of strings their public part has."""
_HOST = 2
_MAX_PRINCIPALS = 256


class Certificate(NamedTuple):
    """A certificate of a host, read but not believed."""

    key: bytes
    """The plain key that it certifies."""
    principals: tuple[str, ...]
    after: int
    before: int
    """Valid from and until, in seconds since the epoch."""
    authority: bytes
    signed: bytes
    signature: bytes

    def speaks_for(
        self, place: Place, authorities: AbstractSet[bytes], revoked: AbstractSet[bytes], now: float
    ) -> bool:
        """Say whether it holds for a place now.

        Raises:
            WireError: the authority's key or signature is of a kind that is not known here.
        """
        if self.authority not in authorities or {self.authority, self.key} & revoked:
            return False
        if not self.after <= now < self.before:
            return False
        if not any(fits(principal.lower(), place.host.lower()) for principal in self.principals):
            return False
        return ssh_keys.verifies(self.authority, self.signature, self.signed)


def is_certificate(blob: bytes) -> bool:
    """Say whether a key's blob is a certificate.

    Raises:
        WireError: these bytes are no key.
    """
    return ssh_keys.key_type(blob).endswith(_SUFFIX)


def parse(blob: bytes) -> Certificate:
    """Return a host's certificate.

    Raises:
        WireError: it is none, of another kind, or has options that nobody knows.
    """
    reader = Reader(blob)
    kind = reader.text().removesuffix(_SUFFIX)
    if kind not in _FIELDS:
        raise WireError(f"certificates of the kind {kind[:64]} are not known here")
    reader.string()  # the nonce
    key = string(kind.encode()) + b"".join(string(reader.string()) for _ in range(_FIELDS[kind]))
    reader.u64()  # the serial number
    if reader.u32() != _HOST:
        raise WireError("the certificate is not a host's")
    reader.string()  # the authority's name for it
    principals = _principals(reader.string())
    after, before = reader.u64(), reader.u64()
    critical = reader.string()
    reader.string()  # extensions: what is not known there is to be ignored
    reader.string()  # reserved
    authority = reader.string()
    signed = blob[: reader.position]
    signature = reader.string()
    reader.end()
    if critical:
        raise WireError("the certificate has critical options, and hosts have none")
    if is_certificate(authority):
        raise WireError("an authority's key is no certificate itself")
    return Certificate(key, principals, after, before, authority, signed, signature)


def _principals(data: bytes) -> tuple[str, ...]:
    """Return the names it is for. Without any it would be for every host: such a one is for none here."""
    reader = Reader(data)
    names: list[str] = []
    while reader.rest and len(names) < _MAX_PRINCIPALS:
        names.append(reader.text())
    reader.end()
    return tuple(names)
