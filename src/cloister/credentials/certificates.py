"""The per-user certificate authority and the certificates it issues for single hosts.

A sandbox that uses credentials trusts this authority, nothing else does. Its certificates are for
TLS servers only, it cannot make another authority, and it can be confined to names. A
certificate for a host is valid for days, from well before it is made, since clocks step.
Pure: the clock is an argument, nothing is read or stored. Sources: RFC 5280 (profile), RFC 6125
(names stand in subjectAltName only).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_BACKDATED = timedelta(days=30)
AUTHORITY_LIFETIME = timedelta(days=365)
AUTHORITY_MARGIN = timedelta(days=30)
"""An authority is replaced this long before its end, so that what a run trusts outlives the run."""
LEAF_BACKDATED = timedelta(days=2)
LEAF_LIFETIME = timedelta(days=7)


class Pair(NamedTuple):
    """A private key and its certificate, both PEM. Never printed."""

    key_pem: bytes
    cert_pem: bytes

    def __repr__(self) -> str:  # type: ignore[explicit-override] # 3.11 has no @override, and this room no stand-in
        """Show that it is one, and nothing of it."""
        return "Pair(...)"


class Issuer(NamedTuple):
    """An authority that was read and is ready to issue."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_authority(now: float, hosts: Sequence[str] = ()) -> Pair:
    """Make an authority (P-256, no authority below it, TLS servers only).

    Args:
        now: seconds since the epoch.
        hosts: where given, the only names and addresses it can speak for (and the names below them); a
            certificate for any other host is refused by clients. Empty leaves it free, for a policy that changes.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Cloister, for this user's sandboxes")])
    begun = _time(now)
    builder = (
        _builder(name, name, key.public_key())
        .not_valid_before(begun - AUTHORITY_BACKDATED)
        .not_valid_after(begun + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(_constraints(hosts), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Pair(key_pem, certificate.public_bytes(Encoding.PEM))


def usable_authority(cert_pem: bytes, now: float) -> bool:
    """Say whether an authority is valid now and for a while to come; a new one is made otherwise."""
    try:
        certificate = x509.load_pem_x509_certificate(cert_pem)
    except ValueError:
        return False
    when = _time(now)
    first = certificate.not_valid_before_utc + LEAF_BACKDATED
    return first <= when <= certificate.not_valid_after_utc - AUTHORITY_MARGIN


def load_issuer(pair: Pair) -> Issuer:
    """Read an authority.

    Raises:
        ValueError: when the key or the certificate cannot be read, or they do not belong together.
    """
    key = load_pem_private_key(pair.key_pem, None)
    certificate = x509.load_pem_x509_certificate(pair.cert_pem)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("the key of the certificate authority does not belong to its certificate")
    return Issuer(key, certificate)


def issue(issuer: Issuer, host: str, now: float, password: bytes) -> Pair:
    """Issue a certificate for one host: P-256, the name in subjectAltName only, never an authority.

    Args:
        issuer: the authority.
        host: a canonical name or address.
        now: seconds since the epoch; the certificate is valid from two days before to seven days after.
        password: encrypts the key in the result, since OpenSSL takes it by way of a file.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    begun, authority = _time(now), issuer.certificate
    certificate = (
        _builder(x509.Name([]), authority.subject, key.public_key())
        .not_valid_before(max(begun - LEAF_BACKDATED, authority.not_valid_before_utc))
        .not_valid_after(min(begun + LEAF_LIFETIME, authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(host)]), critical=True)  # RFC 5280: without a subject
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    return Pair(key_pem, certificate.public_bytes(Encoding.PEM))


def _builder(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    """Begin a certificate with what both kinds share."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return the one thing a key is for: to sign certificates, or handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _constraints(hosts: Sequence[str]) -> x509.NameConstraints:
    """Permit some hosts only; a kind of name of which none is permitted is excluded as a whole."""
    names = [_general(host) for host in hosts]
    permitted: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_network(name.value)) if isinstance(name, x509.IPAddress) else name for name in names
    ]
    excluded: list[x509.GeneralName] = []
    if not any(isinstance(name, x509.IPAddress) for name in names):
        excluded += [x509.IPAddress(ipaddress.ip_network(every)) for every in ("0.0.0.0/0", "::/0")]
    if not any(isinstance(name, x509.DNSName) for name in names):
        excluded.append(x509.DNSName(""))
    return x509.NameConstraints(permitted, excluded or None)


def _general(host: str) -> x509.DNSName | x509.IPAddress:
    """Return a host as certificates name it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _time(seconds: float) -> datetime:
    """Return a time as certificates hold it."""
    return datetime.fromtimestamp(int(seconds), UTC)
