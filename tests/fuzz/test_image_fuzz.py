"""What comes with an image or a trust store may be anything: the answer is a refusal of ours, never another error."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import DeniedError, PolicyError
from cloister.host.image_open import decode_manifest
from cloister.images.initramfs import Module, guest_entries, modules_of, newc
from cloister.images.lock import decode
from cloister.images.recipe import load
from cloister.images.trust import key_line, parse_keys, parse_signatures, signature_line
from support.made_image import root_image

KEY = "ab" * 32
ARCHIVE = newc(guest_entries(b"program" * 50, [Module("a.ko", b"x" * 100), Module("b.ko", b"y", optional=True)]))
WORDS = st.lists(
    st.one_of(
        st.text(max_size=80), st.sampled_from([key_line(KEY), signature_line(KEY, bytes(64)), "names=", KEY, "\n", " "])
    )
).map("".join)


@given(WORDS)
def test_any_trust_store_and_any_signatures_are_read_or_refused(text: str) -> None:
    """Keys and signatures that come out are whole; everything else is refused."""
    with contextlib.suppress(DeniedError):
        assert all(len(key.public) == 64 for key in parse_keys(text, "f"))
    with contextlib.suppress(DeniedError):
        assert all(len(each.value) == 64 for each in parse_signatures(text.encode()))


@given(st.one_of(st.binary(max_size=300), WORDS.map(str.encode)))
def test_any_manifest_and_any_lock_are_read_or_refused(data: bytes) -> None:
    """A manifest is what a build wrote, in its canonical form, or it is refused."""
    with contextlib.suppress(DeniedError):
        assert decode_manifest(data, "x").canonical() == data
    with contextlib.suppress(ValueError):
        decode(data)


@given(st.text(max_size=400))
def test_any_recipe_is_read_or_refused(text: str) -> None:
    """A recipe that is none is refused with its mistakes."""
    with contextlib.suppress(PolicyError):
        load(f"schema = 1\nname = 'x'\n{text}", "x.toml")


@given(st.integers(0, len(ARCHIVE) - 1), st.binary(min_size=1, max_size=12))
def test_a_damaged_initramfs_ends_in_a_refusal(at: int, data: bytes) -> None:
    """Reading back what `newc` wrote, with bytes changed anywhere, never loops and never fails otherwise."""
    with contextlib.suppress(ValueError):
        modules_of(ARCHIVE[:at] + data + ARCHIVE[at + len(data) :])


def test_the_made_up_image_is_one() -> None:
    """The twin: what the other tests damage is whole."""
    assert [module.name for module in modules_of(ARCHIVE)] == ["a.ko", "b.ko"]
    image, table = root_image()
    assert len(image) == table.size
