"""The authority of one user and what it issues, checked by another implementation of X.509 as well."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cloister.credentials import certificates as made

NOW = 1_800_000_000.0
WHEN = datetime.fromtimestamp(NOW, UTC)


def read(pair: made.Pair) -> x509.Certificate:
    """Return the certificate of a pair."""
    return x509.load_pem_x509_certificate(pair.cert_pem)


def verify(authority: made.Pair, leaf: made.Pair, host: str, when: datetime = WHEN) -> None:
    """Verify as a strict client does (the rules of the web's PKI, in Rust)."""
    verifier = PolicyBuilder().store(Store([read(authority)])).time(when).build_server_verifier(x509.DNSName(host))
    verifier.verify(read(leaf), [])


def test_an_authority_can_do_one_thing_only():
    """P-256, signs certificates of TLS servers, none of other authorities, and nothing shows its key by accident."""
    authority = made.make_authority(NOW)
    certificate = read(authority)
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, False, False)
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    assert repr(authority) == "Pair(...)"
    assert made.make_authority(NOW).key_pem != authority.key_pem


def test_a_certificate_is_for_its_host_only():
    """A strict verifier accepts a leaf for its host and for no other, and the name stands in subjectAltName only."""
    authority = made.make_authority(NOW)
    leaf = made.issue(made.load_issuer(authority), "api.a.test", NOW, b"secret")
    verify(authority, leaf, "api.a.test")
    for other in ("a.test", "x.api.a.test", "b.test"):
        with pytest.raises(VerificationError):
            verify(authority, leaf, other)
    assert list(read(leaf).subject) == []
    assert b"ENCRYPTED" in leaf.key_pem


@pytest.mark.parametrize(("step", "valid"), [(-1.9, True), (-2.1, False), (6.9, True), (7.1, False)])
def test_a_clock_that_steps_finds_a_valid_certificate(step, valid):
    """A leaf is valid from two days before it was made to seven days after."""
    authority = made.make_authority(NOW)
    leaf = made.issue(made.load_issuer(authority), "a.test", NOW, b"secret")
    when = WHEN + timedelta(days=step)
    if valid:
        verify(authority, leaf, "a.test", when)
    else:
        with pytest.raises(VerificationError):
            verify(authority, leaf, "a.test", when)


def test_a_leaf_outlives_nothing_of_its_authority():
    """Validity of a leaf lies within that of the authority, and an authority is replaced a month before its end."""
    authority = made.make_authority(NOW)
    late = NOW + 364.5 * 86400
    leaf = read(made.issue(made.load_issuer(authority), "a.test", late, b"secret"))
    assert leaf.not_valid_after_utc == read(authority).not_valid_after_utc
    assert made.usable_authority(authority.cert_pem, NOW)
    assert made.usable_authority(authority.cert_pem, NOW - 27 * 86400)
    assert not made.usable_authority(authority.cert_pem, NOW - 29 * 86400)
    assert not made.usable_authority(authority.cert_pem, NOW + 336 * 86400)
    assert not made.usable_authority(b"nonsense", NOW)


def test_an_authority_can_be_confined_to_names():
    """Where hosts are given, a leaf for another host is refused by clients, and so is one for an address."""
    authority = made.make_authority(NOW, ["a.test"])
    issuer = made.load_issuer(authority)
    verify(authority, made.issue(issuer, "a.test", NOW, b"x"), "a.test")
    with pytest.raises(VerificationError):
        verify(authority, made.issue(issuer, "b.test", NOW, b"x"), "b.test")
    constraints = read(authority).extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    assert len(constraints.value.excluded_subtrees or []) == 2


def test_a_leaf_is_no_authority():
    """What a leaf signs is trusted by nobody."""
    authority = made.make_authority(NOW)
    middle = made.make_authority(NOW)
    false = made.issue(made.load_issuer(middle), "a.test", NOW, b"x")
    with pytest.raises(VerificationError):
        verify(authority, false, "a.test")


def test_openssl_trusts_it_too():
    """OpenSSL loads the authority as one, in its strict mode as well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=made.make_authority(NOW).cert_pem.decode())
    assert context.cert_store_stats()["x509_ca"] == 1


def test_a_key_of_somebody_else_is_refused():
    """Key and certificate must belong together."""
    with pytest.raises(ValueError, match="does not belong"):
        made.load_issuer(made.Pair(made.make_authority(NOW).key_pem, made.make_authority(NOW).cert_pem))
