"""Ids of runs: they sort by time, also when many runs start within one second."""

from __future__ import annotations

from cloister.runs.store import new_id


def test_ids_sort_by_time() -> None:
    """A run that starts in a later second has a greater id."""
    assert [len(new_id(1_800_000_000.0 + second)) for second in range(3)] == [10, 10, 10]
    ids = [new_id(1_800_000_000.0 + second) for second in range(200)]
    assert ids == sorted(ids)


def test_ids_of_one_second_sort_by_the_order_they_were_made_in() -> None:
    """`last` must be the last one, and runs take a few milliseconds."""
    ids = [new_id(1_800_000_000.0)]
    for _ in range(500):
        ids.append(new_id(1_800_000_000.5, ids[-1]))
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)


def test_ids_differ_by_chance() -> None:
    """Without an id before, two of one second are not the same but for one in a million."""
    assert len({new_id(1_800_000_000.0) for _ in range(20)}) > 18


def test_an_id_at_the_end_of_a_second_is_followed_by_the_next() -> None:
    """The last id of a second carries over, as a number does."""
    first = new_id(1_800_000_000.0)
    assert new_id(1_800_000_000.0, first[:6] + "zzzz") == new_id(1_800_000_001.0)[:6] + "0000"
