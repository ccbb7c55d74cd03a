"""The words of `run` and `exec`: one parser, whether they come from Python or raw from the front door."""

from __future__ import annotations

import pytest

from cloister.errors import UsageError
from cloister.runs import words

RUN = {"verb": "run", "cwd": "/home/dev/p", "terminal": "1", "raw": "1"}
EXEC = {"verb": "exec", "cwd": "/home/dev/p", "terminal": "1", "raw": "1"}


def expand(fields: dict[str, str], *argv: str) -> tuple[dict[str, str], list[str]]:
    """Expand words that are understood."""
    expanded = words.expand(fields, list(argv))
    assert expanded is not None
    return expanded


def test_arguments_behind_an_agent_are_appended_and_behind_two_dashes_they_replace() -> None:
    """`run claude -p x` keeps the agent's command; `run claude -- ls -l` puts `ls -l` in its place."""
    fields, command = expand(RUN, "claude", "-p", "x")
    assert (fields["agent"], fields["replaced"], command) == ("claude", "", ["-p", "x"])
    fields, command = expand(RUN, "claude", "--", "ls", "-l")
    assert (fields["agent"], fields["replaced"], command) == ("claude", "1", ["ls", "-l"])


def test_a_directory_is_relative_to_where_the_caller_stands() -> None:
    """The broker stands in `/`, so `-C ../q` counts from the caller's directory, and without it that is the start."""
    assert expand(RUN, "shell")[0]["directory"] == "/home/dev/p"
    assert expand(RUN, "-C", "../q", "shell")[0]["directory"] == "/home/dev/q"
    assert expand(RUN, "--directory=/srv", "shell")[0]["directory"] == "/srv"


def test_a_pty_needs_a_terminal_and_no_objection() -> None:
    """Pipes stay pipes, and `--no-pty` wins on a terminal."""
    assert expand(RUN, "shell")[0]["pty"] == "1"
    assert expand(RUN, "--no-pty", "shell")[0]["pty"] == ""
    assert expand({**RUN, "terminal": ""}, "shell")[0]["pty"] == ""
    assert expand(EXEC, "--no-pty", "r1", "ls")[0]["pty"] == ""


def test_raw_fields_cannot_choose_what_only_words_may() -> None:
    """A raw request cannot smuggle an id or an agent past the parser: only parsed fields come out."""
    fields, _ = expand({**RUN, "id": "x", "agent": "root", "yes": "1"}, "shell")
    assert (fields["agent"], "id" in fields, fields["yes"]) == ("shell", False, "")


@pytest.mark.parametrize("argv", [["--help"], ["-h", "shell"], ["--dry-run", "shell"]])
def test_help_and_the_dry_run_are_left_to_the_command_line(argv: list[str]) -> None:
    """They print on standard output, which the broker cannot."""
    assert words.expand(RUN, argv) is None


def test_exec_takes_a_run_and_a_command() -> None:
    """With or without two dashes between them, and `--help` goes to the command line."""
    expected = {"verb": "exec", "run": "r1", "directory": "/tmp", "pty": "1"}
    assert expand(EXEC, "-C", "/tmp", "r1", "--", "ls") == (expected, ["ls"])
    assert expand(EXEC, "-C", "/tmp", "r1", "ls") == (expected, ["ls"])
    assert words.expand(EXEC, ["--help"]) is None


@pytest.mark.parametrize(
    ("fields", "argv", "reference"),
    [
        (RUN, [], "agent-missing"),
        (RUN, ["--nonsense", "shell"], "option-unknown"),
        (RUN, ["-C"], "value-missing"),
        (RUN, ["shell", "--"], "command-missing"),
        (EXEC, [], "run-missing"),
        (EXEC, ["r1"], "command-missing"),
        (EXEC, ["-x", "r1", "ls"], "option-unknown"),
    ],
)
def test_wrong_words_are_refused(fields: dict[str, str], argv: list[str], reference: str) -> None:
    """Each with its own reference."""
    with pytest.raises(UsageError) as caught:
        words.expand(fields, argv)
    assert caught.value.reference == reference
