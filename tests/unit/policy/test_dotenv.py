"""Files of variables: the grammar, and which names may come from them."""

from __future__ import annotations

import pytest

from cloister.policy.dotenv import DotenvError, check_file_variable, parse

GOOD = {
    "": {},
    "# only a comment\n\n   \n": {},
    "A=1": {"A": "1"},
    "A=1\nA=2\n": {"A": "2"},
    "export A=1\n\texport  B = two words \n": {"A": "1", "B": "two words"},
    "A=x#y #z": {"A": "x#y"},
    "A= # nothing": {"A": ""},
    "A=$HOME ${B} $(id)": {"A": "$HOME ${B} $(id)"},
    r"A=C:\new": {"A": r"C:\new"},
    "A='it $is # \\n'  # c": {"A": "it $is # \\n"},
    'A="a\\nb\\t\\"q\\" \\$x \\\\ \\z"': {"A": 'a\nb\t"q" $x \\ \\z'},
    "A='two\nlines'\nB=3": {"A": "two\nlines", "B": "3"},
    "\ufeffA=1\r\nB=2\r\n": {"A": "1", "B": "2"},
    "A=it's": {"A": "it's"},
}


@pytest.mark.parametrize("text", GOOD)
def test_what_env_files_have_in_common_is_read(text: str) -> None:
    """Comments, export, three kinds of values; nothing is expanded, nothing runs."""
    assert parse(text) == GOOD[text]


BAD = [("A=1\nB\n", 2), ("=1", 1), ("1A=1", 1), ("A-B=1", 1), ("\nA='open\nB=2\n", 2), ('A="x" y', 1), ("A=\0", 1)]


@pytest.mark.parametrize(("text", "line"), [*BAD, ("set A=1", 1)])
def test_a_file_with_a_mistake_counts_for_nothing(text: str, line: int) -> None:
    """Flaw PF9: a quote that is never closed made lines of other files part of a value. Here it names its line."""
    with pytest.raises(DotenvError) as caught:
        parse(text)
    assert caught.value.line == line


LOADING = "LD_PRELOAD NODE_OPTIONS PATH HOME BASH_ENV PYTHONSTARTUP GIT_SSH_COMMAND HTTPS_PROXY https_proxy EDITOR"
LEADING = "NPM_CONFIG_PREFIX npm_config_prefix CLOISTER_RUN XDG_CONFIG_HOME JAVA_TOOL_OPTIONS SSL_CERT_FILE"


@pytest.mark.parametrize("name", [*LOADING.split(), *LEADING.split()])
def test_names_that_load_code_come_from_no_file(name: str) -> None:
    """Flaw PF9: a user's `.env` could set PATH, NODE_OPTIONS or LD_PRELOAD of the agent."""
    with pytest.raises(ValueError, match="variable"):
        check_file_variable(name)


@pytest.mark.parametrize("name", ["PI_MODEL", "TZ", "LOG_LEVEL", "MAX_TOKENS", "PATHS", "NODENAME", "HOMEPAGE"])
def test_ordinary_names_do(name: str) -> None:
    """The positive twin: what says how a product behaves."""
    check_file_variable(name)
