"""No text makes the reader of variable files hang, run or raise anything but its own error."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from cloister.policy.dotenv import DotenvError, parse

SIGNS = st.text(st.sampled_from("AB_1=#'\"\\ \t\r\nexport$`\0\u00e4"), max_size=200)


@given(st.one_of(SIGNS, st.text(max_size=200)))
@example("A=" + "\\" * 5000)
@example('A="' + "\\" * 5001)
@example("A=" + " #" * 3000)
def test_any_text_is_read_or_refused_with_its_line(text: str) -> None:
    """Names are names, and no value has a NUL."""
    found: dict[str, str] = {}
    line = 1
    try:
        found = parse(text)
    except DotenvError as error:
        line = error.line
    assert 1 <= line <= text.count("\n") + 1
    assert all(name.isidentifier() and name.isascii() and "\0" not in value for name, value in found.items())


@given(st.text(st.characters(blacklist_characters="'\0\r", blacklist_categories=["Cs"]), max_size=100))
def test_a_quoted_value_comes_back(value: str) -> None:
    """Whatever stands between single quotes is the value."""
    assert parse(f"A='{value}'\nB=1") == {"A": value, "B": "1"}
