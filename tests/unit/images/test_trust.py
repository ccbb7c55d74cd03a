"""Trust stores and signatures as text: what is not understood is refused."""

from __future__ import annotations

import pytest

from cloister.errors import DeniedError
from cloister.images.trust import (
    TrustedKey,
    check_not_older,
    judge,
    key_line,
    parse_keys,
    parse_signatures,
    signature_line,
)
from support.made_image import Signer

KEY = "ab" * 32
OTHER = "cd" * 32


def test_a_line_of_a_trust_store_is_read_as_it_was_written() -> None:
    """Key, names and comment come back; empty lines and comments count for nothing."""
    text = "# ours\n\n" + key_line(KEY, names=("dev", "acme-*"), comment="build machine") + key_line(OTHER)
    assert parse_keys(text, "f") == [TrustedKey(KEY, "f", ("dev", "acme-*"), "build machine"), TrustedKey(OTHER, "f")]


@pytest.mark.parametrize(
    "line",
    [
        KEY, f"cloister-image-key-v2 {KEY}", f"cloister-image-key-v1 {KEY[:-1]}",
        f"cloister-image-key-v1 {KEY.upper()}", "ssh-ed25519 AAAA", f"cloister-image-key-v1 {KEY}\0",
        "-----BEGIN PUBLIC KEY-----",
    ],
)  # fmt: skip
def test_a_line_that_is_not_understood_refuses_the_whole_store(line: str) -> None:
    """Nobody guesses what it was to allow; the line is named."""
    with pytest.raises(DeniedError) as caught:
        parse_keys(key_line(OTHER) + line + "\n", "mine.pub")
    assert (caught.value.reference, caught.value.where) == ("image-trust-file", "mine.pub:2")


def test_a_key_with_names_but_none_signs_nothing() -> None:
    """`names=` with nothing behind it allows nothing, rather than everything."""
    (key,) = parse_keys(f"cloister-image-key-v1 {KEY} names=\n", "f")
    assert not key.may_sign("dev")


@pytest.mark.parametrize(
    "data",
    [
        b"x", b"cloister-image-signature-v1 " + KEY.encode(), signature_line(KEY, bytes(63)).encode(), b"\xff" * 100,
        signature_line(KEY, bytes(64)).encode().replace(b" ", b"\t"),
        signature_line(KEY, bytes(64)).encode() * 17, b"\n",
    ],
)  # fmt: skip
def test_signatures_that_are_none_are_refused(data: bytes) -> None:
    """A file of signatures is lines of one form, at most sixteen."""
    with pytest.raises(DeniedError) as caught:
        parse_signatures(data)
    assert caught.value.reference == "image-signature-bad"
    assert parse_signatures(signature_line(KEY, bytes(64)).encode() * 16)
    assert parse_signatures(b"") == []


def test_a_wrong_signature_of_a_trusted_key_is_not_passed_over_beside_a_good_one() -> None:
    """Two trusted keys, one signature right, one wrong: refused."""
    one, two = Signer(), Signer()
    keys = [TrustedKey(one.public, "f"), TrustedKey(two.public, "f")]
    good = parse_signatures(signature_line(one.public, one._key.sign(b"message")).encode())
    bad = parse_signatures(signature_line(two.public, one._key.sign(b"message")).encode())
    assert judge(b"message", good, keys, "dev") == keys[0]
    with pytest.raises(DeniedError) as caught:
        judge(b"message", good + bad, keys, "dev")
    assert caught.value.reference == "image-signature-bad"
    # One of a stranger, whatever it is worth, changes nothing.
    assert judge(b"message", good + bad, keys[:1], "dev") == keys[0]


def test_older_is_refused_and_equal_is_not() -> None:
    """Going back is refused; using the same again, or a newer one, is not."""
    check_not_older("dev", 4, 4)
    check_not_older("dev", 5, 4)
    with pytest.raises(DeniedError) as caught:
        check_not_older("dev", 3, 4)
    assert caught.value.remedy == "cloister image allow-older dev 3"
