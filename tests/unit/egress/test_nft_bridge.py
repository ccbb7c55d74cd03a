"""The text of the bridge's packet filter."""

from __future__ import annotations

from pathlib import Path

from cloister.egress.nft_bridge import COUNTERS, SETS, ruleset
from cloister.plan.bridge import BRIDGE, TABLE

GOLDEN = Path(__file__).parents[2] / "golden/bridge.nft"


def test_the_text_is_what_was_reviewed() -> None:
    """Every change of it is seen."""
    assert ruleset() == GOLDEN.read_text(encoding="utf-8")


def test_it_names_no_guest_and_no_address() -> None:
    """Guests are elements of its sets, so one text holds for every network; both tables come in one transaction."""
    text = ruleset()

    assert "10.0.0" not in text
    assert text.count(f"delete table bridge {TABLE}") == text.count(f"delete table inet {TABLE}") == 1
    assert all(f"\tset {name} {{" in text for _, name in SETS)


def test_every_chain_of_a_guest_ends_in_a_counted_drop() -> None:
    """What no rule lets pass is refused, in both directions and families."""
    for table in ruleset().split("\ntable ")[1:]:
        for chain in table.split("\tchain ")[1:]:
            name, last = chain.split(" ", 1)[0], chain.rstrip("}\n\t ").splitlines()[-1]
            hooked = "type filter hook" in chain
            assert hooked or (last.endswith("drop") and "counter name" in last), name


def test_others_packets_are_left_alone() -> None:
    """Only what has to do with the bridge or its taps is judged: every rule of a hook says so."""
    for line in ruleset().splitlines():
        if "goto" in line and "answers" not in line:
            assert line.split()[1] in {'"clvm*"', f'"{BRIDGE}"'}
    assert set(COUNTERS) == {"bridge", "inet"}
