"""Masking: what is hidden, what passes, and when."""

import pytest

from cloister.credentials.mask import Masker


def test_a_secret_becomes_stars_of_the_same_length():
    """Every occurrence is hidden, and nothing else changes."""
    masker = Masker([b"s3cret"])
    assert masker.feed(b"a s3cret and s3cret.") + masker.flush() == b"a ****** and ******."
    assert masker.mask(b"s3cre") == b"s3cre"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_secret_is_found_across_pieces(cut):
    """Wherever a piece ends, the secret in it is hidden."""
    masker, text = Masker([b"s3cret"]), b"ab-s3cret-cd"
    assert masker.feed(text[:cut]) + masker.feed(text[cut:]) + masker.flush() == b"ab-******-cd"


def test_only_what_could_be_a_secret_waits():
    """Bytes with which no secret begins pass at once; a beginning waits, and passes when it was none."""
    masker = Masker([b"s3cret"])
    assert masker.feed(b"data: x\n\n") == b"data: x\n\n"
    assert masker.feed(b"data: s3") == b"data: "
    assert masker.feed(b"x") == b"s3x"
    assert masker.feed(b"s3cre") == b""
    assert masker.flush() == b"s3cre"


def test_secrets_that_overlap_are_both_hidden():
    """Where one secret begins inside another, all bytes of both are stars, also across pieces."""
    masker = Masker([b"abc", b"cde", b""])
    assert masker.feed(b"-abcde-") + masker.flush() == b"-*****-"
    assert masker.feed(b"-abc") + masker.feed(b"de-") + masker.flush() == b"-*****-"
    assert Masker([b"aa"]).mask(b"aaab") == b"***b"


def test_without_secrets_nothing_waits():
    """A masker without secrets passes everything."""
    assert Masker([]).feed(b"anything") == b"anything"
