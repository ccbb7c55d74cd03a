"""Certificates of hosts: one of a known authority binds a connection, every other one binds nothing."""

import pytest

from cloister.credentials.ssh_agent import FAILURE, SUCCESS, Grant, Ring, SshAgentFilter
from cloister.credentials.ssh_keys import fingerprint
from cloister.credentials.ssh_known_hosts import HostKeys, Place
from support.ssh_material import (
    SESSION,
    Key,
    bind,
    certify,
    login,
    make_ecdsa,
    make_ed25519,
    make_rsa,
    sign_request,
)

NOW = 1_750_000_000
HOST, AUTHORITY, STRANGER, KEY = make_ed25519(1), make_ed25519(4), make_ed25519(5), make_ed25519(10)
PLACE = Place("git.example.org")
RING = Ring(
    "claude",
    (Grant("forge", fingerprint(KEY.blob), frozenset({PLACE})),),
    {PLACE: HostKeys(authorities=frozenset({AUTHORITY.blob}))},
)


def bound(shown: Key, ring: Ring = RING, session: bytes = SESSION) -> bool:
    """Say whether what a host shows binds a connection, so that a login there is signed."""
    judge = SshAgentFilter(ring, lambda: NOW)
    step = judge.request(bind(shown, session))
    if step.reply == FAILURE:
        return False
    assert judge.answered(SUCCESS).reply == SUCCESS
    return bool(judge.request(sign_request(KEY, login(KEY, host=shown))).ask)


@pytest.mark.parametrize("make", [make_ed25519, make_ecdsa, make_rsa])
@pytest.mark.parametrize("principal", [b"git.example.org", b"*.example.org", b"GIT.example.org"])
def test_a_certificate_of_a_known_authority_binds(make, principal: bytes) -> None:
    """Hosts with keys of every kind, named in full or by a pattern."""
    assert bound(certify(make(), AUTHORITY, (b"other", principal)))


@pytest.mark.parametrize(
    "shown",
    [
        certify(HOST, STRANGER),
        certify(HOST, AUTHORITY, (b"www.example.org",)),
        certify(HOST, AUTHORITY, ()),
        certify(HOST, AUTHORITY, before=NOW),
        certify(HOST, AUTHORITY, after=NOW + 1),
        certify(HOST, AUTHORITY, kind=1),
        certify(HOST, AUTHORITY, critical=b"x"),
        certify(HOST, certify(AUTHORITY, AUTHORITY)),
        HOST,
        AUTHORITY,
        certify(HOST, AUTHORITY)._replace(private=STRANGER.private),
        Key(certify(HOST, AUTHORITY).blob + b"\0", HOST.private),
        Key(certify(HOST, AUTHORITY).blob[:-1] + b"\0", HOST.private),
    ],
)  # fmt: skip
def test_other_certificates_do_not(shown: Key) -> None:
    """Strange authority, other or no names, expired, not yet, a user's, with options, chains, plain keys, forged."""
    assert not bound(shown)


@pytest.mark.parametrize("revoked", [HOST.blob, AUTHORITY.blob])
def test_what_was_taken_back_does_not(revoked: bytes) -> None:
    """A revoked host key is not saved by its certificate, nor a certificate by its revoked authority."""
    assert bound(certify(HOST, AUTHORITY))
    assert not bound(certify(HOST, AUTHORITY), RING._replace(revoked=frozenset({revoked})))


def test_every_changed_byte_is_noticed() -> None:
    """No byte of a certificate can be changed: each is signed, or part of the signature."""
    good = certify(HOST, AUTHORITY).blob
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 1
        assert not bound(Key(bytes(changed), HOST.private)), at
