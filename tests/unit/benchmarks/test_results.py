"""The pure parts of the benchmarks: figures, tables, and what they say of a target."""

from __future__ import annotations

import json

import pytest
from benchmarks.figures import Figure, Missing, compare, interleave
from benchmarks.report import Grid, Host, Line, Part, Section, Target, markdown, number, table
from benchmarks.starts import said
from benchmarks.store import as_json, merged

HOST = Host("6.18", "a processor", 2, 24, "Debian", {"bubblewrap": "0.8.0"})


def test_figures_are_minima_medians_and_their_ratios() -> None:
    """Each row against the base row: minimum by minimum, median by median, in the order given."""
    rows = compare({"base": [2.0, 4.0, 3.0], "other": [6.0, 12.0, 30.0], "none": []}, "base")
    assert rows == [Figure("base", 2.0, 3.0, 1.0, 1.0, 3), Figure("other", 6.0, 12.0, 3.0, 4.0, 3)]


def test_nothing_to_compare_with_is_an_error() -> None:
    """A table without its base would have made-up ratios."""
    with pytest.raises(ValueError, match="'base'"):
        compare({"base": [], "other": [1.0]}, "base")


def test_rounds_are_interleaved_and_the_first_do_not_count() -> None:
    """Every case is called once per round, in turn; samples of the warm-up are dropped."""
    calls: list[str] = []

    def case(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = interleave({"a": lambda: case("a"), "b": lambda: case("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.0123, "0.0123"),
        (0.5, "0.500"),
        (2.345, "2.35"),
        (23.45, "23.4"),
        (234.5, "234"),
        (2345.0, "2345"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, shown: str) -> None:
    """A column reads down whatever its size."""
    assert number(value) == shown


def test_what_is_missing_stands_in_the_table_with_its_reason() -> None:
    """A peer that is not there has a row without figures."""
    lines = table([Figure("bwrap", 2, 3, 1, 1, 9), Missing("srt", "not installed")], "ms")
    assert lines[2] == "| bwrap | 2.00 | 3.00 | 1.00 | 1.00 | 9 |"
    assert lines[3].startswith("| srt | not measured: not installed |")
    assert "ms" in lines[0]


def test_a_missed_target_says_by_how_much() -> None:
    """And one that was met says what was reached."""
    assert said(5.5, 6.0) == "Met: 5.5 x."
    assert said(9.0, 6.0) == "Missed by 50 %: 9 x."


COLD = Section("Cold", "ms", [Figure("bwrap", 2, 3, 1, 1, 9), Missing("srt", "not installed")], "note", "fast", "Met.")
PROXY = Grid("Proxy", ("req/s", "MB"), [Line("a", {"req/s": 2.0}), Missing("b", "gone")], "why", [Target("x", "Met.")])


def test_the_page_and_the_data_hold_the_same_sections() -> None:
    """Both renderings come from one value."""
    parts = [Part("cold", "2026-01-01", [COLD])]
    page = markdown(HOST, parts)
    data = json.loads(as_json(HOST, parts))
    assert "## Cold\n\nnote\n\n| |" in page
    assert "Target: fast. Met." in page
    assert data["parts"][0]["sections"][0]["rows"][0]["ratio_of_minima"] == 1
    assert data["host"]["versions"] == {"bubblewrap": "0.8.0"}


def test_a_grid_has_a_cell_for_each_column_and_its_targets_below() -> None:
    """A value that a row has not stays empty; what is missing says why."""
    page = markdown(HOST, [Part("llm", "2026-01-01", [PROXY])])
    assert "| | req/s | MB |\n|---|--:|--:|\n| a | 2.00 |  |\n| b | not measured: gone |  |\n" in page
    assert page.endswith("\nTarget: x. Met.\n")


def test_a_part_that_was_not_measured_again_is_kept_with_its_date() -> None:
    """Measuring one part does not lose the others, nor the versions they were measured with."""
    earlier = as_json(HOST, [Part("cold", "2026-01-01", [COLD]), Part("llm", "2026-01-01", [])])
    host = HOST._replace(versions={"nginx": "1.22"})
    host, parts = merged(earlier, host, [Part("llm", "2026-01-02", [PROXY])], ("cold", "llm"))
    assert parts == [Part("cold", "2026-01-01", [COLD]), Part("llm", "2026-01-02", [PROXY])]
    assert host.versions == {"bubblewrap": "0.8.0", "nginx": "1.22"}
    assert "## Cold\n\nMeasured on 2026-01-01.\n" in markdown(host, parts)


def test_figures_of_another_machine_are_not_kept() -> None:
    """A page compares what was measured on one machine."""
    earlier = as_json(HOST._replace(cores=64), [Part("cold", "2026-01-01", [COLD])])
    fresh = [Part("llm", "2026-01-02", [PROXY])]
    assert merged(earlier, HOST, fresh, ("cold", "llm")) == (HOST, fresh)
    assert merged("", HOST, fresh, ("cold", "llm")) == (HOST, fresh)
