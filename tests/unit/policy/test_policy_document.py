"""Reading policy text: what is refused, and on which line each key is found."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.policy.document import MAX_BYTES, read, show_path

TOML = """\
schema = 1
[agents.claude]   # a comment with [brackets] = "and signs"
"odd name" = 3
a.b = 1
x = [ "a]", '''q
more''',
  { k = "v", l.m = [1,
2] },
]
[[agents.claude.egress.allow]]
host = "x"
[[agents.claude.egress.allow]]
host = 'y'
"""


def refusal(text, name="p.toml"):
    """Return the one problem of a text that must be refused."""
    with pytest.raises(PolicyError) as caught:
        read(text, name)
    assert caught.value.reference == "policy-unreadable"
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("schema",), 1),
        (("agents",), 2),
        (("agents", "claude"), 2),
        (("agents", "claude", "odd name"), 3),
        (("agents", "claude", "a", "b"), 4),
        (("agents", "claude", "x", 0), 5),
        (("agents", "claude", "x", 1), 5),
        (("agents", "claude", "x", 2, "k"), 7),
        (("agents", "claude", "x", 2, "l", "m", 1), 8),
        (("agents", "claude", "egress", "allow", 0, "host"), 11),
        (("agents", "claude", "egress", "allow", 1), 12),
        (("agents", "claude", "egress", "allow", 1, "host"), 13),
    ],
)
def test_every_key_has_its_line(path, line):
    """A mistake is shown with the line its key stands on, also in arrays, inline tables and multi-line text."""
    assert read(TOML, "p.toml").lines[path] == line


def test_json_keys_have_lines_too():
    """JSON from Nix is located like TOML."""
    document = read('{"schema": 1,\n "agents": {"pi":\n {"command": ["a",\n "b"]}}}', "p.json")
    assert document.lines["agents", "pi", "command", 1] == 4
    assert document.tables["agents"]["pi"]["command"] == ["a", "b"]


def test_where_falls_back_to_the_nearest_parent():
    """A key that nobody wrote is shown at the table in which it is missing."""
    assert read(TOML, "p.toml").where(("agents", "claude", "nothing")) == "p.toml:2 .agents.claude.nothing"
    assert read(TOML, "p.toml").where(("users",)) == "p.toml .users"


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        (b"schema = 1\na = '\xff'\n", "not UTF-8", "p.toml:2"),
        ("schema = 1\n# \ud800", "not UTF-8", "p.toml"),
        ("\ufeffschema = 1\n", "byte order mark", "p.toml:1"),
        ("schema = 1\n# \0\n", "NUL", "p.toml:2"),
        ("schema = 1\nschema = 1\n", "given twice", "p.toml:2"),
        ("[a]\n[b]\n[a]\n", "given twice", "p.toml:3"),
        ("schema = 1\n[agents\n", "not valid TOML", "p.toml:2"),
        ("a = " + "[" * 5000 + "]" * 5000, "nested deeper", "p.toml"),
        (".".join("a" * 40) + " = 1", "nested deeper", "p.toml"),
        ("x = 1\n" + ".".join(['"a"'] * 140) + " = 1", "nested deeper", "p.toml"),
        ("x = " + "9" * 5000, "not a value", "p.toml"),
        ("#" * (MAX_BYTES + 1), "larger than", "p.toml"),
        ('{"a": 1, "a": 2}', "given twice", "p.toml"),
        ('{"a": NaN}', "not a value", "p.toml"),
        ('{"a": \n1,}', "not valid JSON", "p.toml:2"),
    ],
)
def test_unreadable_text_is_one_clear_error(text, message, where):
    """Text that is no policy is refused with what is wrong and the line, whatever is wrong with it."""
    problem = refusal(text)
    assert message in problem.message
    assert problem.where == where


def test_a_json_file_that_is_no_table_is_refused():
    """A bare list or number is valid JSON, and no policy."""
    assert "table" in refusal("[1]", "p.json").message


def test_ordinary_text_is_read():
    """The twin of the refusals: comments, CRLF, unicode and an empty file are all fine."""
    assert read("# ü\r\nschema = 1\r\n", "p.toml").tables == {"schema": 1}
    assert read("", "p.toml").tables == {}
    assert read("# " + "and so on. " * 100 + "..." * 100, "p.toml").tables == {}
    assert read(" \n{}", "p.toml").tables == {}


def test_path_text_is_safe_to_print():
    """Keys that are not bare are quoted, and a long one is cut."""
    assert show_path(("agents", "a b", "x", 2)) == '.agents."a b".x[2]'
    assert show_path(("\x1b[31m",)) == '."\\u001b[31m"'
    assert len(show_path(("k" * 500,))) == 61
