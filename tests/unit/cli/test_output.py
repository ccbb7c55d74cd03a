"""Printing: nothing of an agent's reaches a terminal as a command, tables stay within their width."""

import hypothesis
import hypothesis.strategies as st
import pytest

from cloister.cli import output

ATTACKS = (
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x1bPq#0\x1b\\",
    "\x9b31m",
    "\r\x1b[K",
    "\u202egnp.exe",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x08\x08\x08",
    "\x1b_apc\x1b\\",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_terminal_commands_are_disarmed(attack: str) -> None:
    """No escape, control or text-direction character passes either cleaner; the words around it do."""
    for cleaned in (output.clean(f"before{attack}after"), output.clean_lines(f"before{attack}after")):
        assert all(char.isprintable() for char in cleaned)
        assert cleaned.startswith("before")
        assert cleaned.endswith("after")


def test_plain_output_is_not_touched() -> None:
    """Lines, tabs and every script of the world stay as they are."""
    text = "a\tb\nüñï 漢字 🙂\n"

    assert output.clean_lines(text) == text
    assert output.clean("漢字 ü") == "漢字 ü"


@hypothesis.given(st.text(alphabet=st.characters(), max_size=60))
def test_no_text_gets_a_control_character_through(text: str) -> None:
    """Whatever the text, what is printed is printable, or a line break or tab."""
    assert all(char.isprintable() for char in output.clean(text))
    assert all(char.isprintable() or char in "\n\t" for char in output.clean_lines(text))


@hypothesis.given(
    st.lists(st.tuples(st.text(max_size=30), st.text(max_size=80)), max_size=6),
    st.integers(min_value=50, max_value=120),
)
def test_tables_fit(rows: list[tuple[str, str]], width: int) -> None:
    """No line is wider than the terminal when only the last column is long, and every row stays one line."""
    narrow = [(first[:4], second) for first, second in rows]
    lines = output.table(["A", "B"], narrow, width=width).split("\n")

    assert len(lines) == len(rows) + 1
    assert all(output.cells(line) <= width for line in lines)


def test_columns_are_aligned_by_cells() -> None:
    """Wide characters take two columns, so the next column begins at the same place."""
    lines = output.table(["NAME", "X"], [("漢字", "1"), ("plain", "2")], width=80).split("\n")

    assert [output.cells(line[: line.index(mark)]) for line, mark in zip(lines, "X12", strict=True)] == [7, 7, 7]


def test_nothing_is_cut_for_programs() -> None:
    """Without a terminal (width 0) the last column is whole."""
    assert output.table(["A"], [("x" * 500,)], width=0).endswith("x" * 500)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.34, "0.3 s"), (12.9, "12 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (200000, "2 d")],
)
def test_spans_use_their_largest_unit(seconds: float, text: str) -> None:
    """Lengths of time are short and never round up."""
    assert output.span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")]
)
def test_sizes_are_powers_of_1024(count: int, text: str) -> None:
    """Bytes are shown in binary units, as limits are written."""
    assert output.size(count) == text


def test_clocks_that_went_back_show_no_negative_time() -> None:
    """A start in the future is now."""
    assert output.ago(100.0, 50.0) == "0 s ago"
