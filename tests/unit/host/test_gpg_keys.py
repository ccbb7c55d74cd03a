"""Which parts of an OpenPGP key sign for an agent: by gpg's listing, the ones that can do least."""

import pytest

from cloister.host.gpg_keys import choose

PRIMARY, FIRST, SECOND = "A" * 40, "B" * 40, "C" * 40


def listing(*parts: tuple[str, str, str, str]) -> str:
    """Return gpg's listing: kind, fingerprint, uses and validity of each part."""
    lines = ["tru:o:1:1795215955:1:3:1:5"]
    for kind, fingerprint, uses, validity in parts:
        lines += [f"{kind}:{validity}:255:22:{fingerprint[:16]}:1795215955:::u:::{uses}:::::ed25519:::0:"]
        lines += [f"fpr:::::::::{fingerprint}:", f"grp:::::::::{fingerprint[::-1].lower().upper()}:"]
        lines += ["uid:u::::1795215955::X::Some One <one@example.org>::::::::::0:"] if kind == "pub" else []
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("parts", "wanted", "chosen"),
    [
        ([("pub", PRIMARY, "scSC", "u")], PRIMARY, [PRIMARY]),
        ([("pub", PRIMARY, "cSC", "u"), ("sub", FIRST, "s", "u")], PRIMARY, [FIRST]),
        ([("pub", PRIMARY, "scSC", "u"), ("sub", FIRST, "s", "u")], PRIMARY, [FIRST]),
        ([("pub", PRIMARY, "cSC", "u"), ("sub", FIRST, "sa", "u"), ("sub", SECOND, "s", "u")], PRIMARY, [SECOND]),
        ([("pub", PRIMARY, "cSC", "u"), ("sub", FIRST, "sa", "u")], PRIMARY, [FIRST]),
        ([("pub", PRIMARY, "cSC", "u"), ("sub", FIRST, "sa", "u"), ("sub", SECOND, "s", "u")], FIRST, [FIRST]),
        ([("pub", PRIMARY, "cSC", "u"), ("sub", FIRST, "s", "e"), ("sub", SECOND, "s", "u")], PRIMARY, [SECOND]),
        ([("pub", PRIMARY, "scSC", "u"), ("sub", FIRST, "s", "r")], PRIMARY, [PRIMARY]),
        ([("pub", PRIMARY, "scSC", "r"), ("sub", FIRST, "s", "r")], PRIMARY, []),
        ([("pub", PRIMARY, "cC", "u"), ("sub", FIRST, "e", "u")], PRIMARY, []),
        ([], PRIMARY, []),
    ],
)
def test_the_part_that_can_do_least_is_chosen(parts, wanted: str, chosen: list[str]) -> None:
    """Named subkeys first, then parts that only sign; revoked and expired ones never."""
    assert [part.fingerprint for part in choose(listing(*parts), wanted)] == chosen


@pytest.mark.parametrize("text", ["", ":::", "pub", "grp:::::::::X:", "fpr:::::::::X:\nsub:u", "pub:" + ":" * 40])
def test_strange_listings_choose_nothing(text: str) -> None:
    """What is no listing names no key."""
    assert choose(text, PRIMARY) == []
