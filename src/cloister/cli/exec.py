"""`cloister exec`: run another command in a running sandbox."""

from __future__ import annotations

import os
import sys

from cloister.errors import UsageError
from cloister.runs import client

USAGE = """\
usage: cloister exec [OPTIONS] RUN [--] COMMAND [ARGUMENT...]

Run COMMAND in the sandbox of RUN: same mounts, same filters, same proxy, the
same environment. RUN is an id, the beginning of one, or `last`.

options:
  -C, --directory DIR   start in DIR, a path inside the sandbox
      --no-pty          use pipes even on a terminal
  -h, --help            show this text

exit codes: the command's own; 125 cloister failed, 126 cannot be executed,
127 not found, 128+n ended by signal n.
"""


def main(argv: list[str]) -> int:
    """Parse, ask the broker, become the shim."""
    directory, terminal, index = "", os.isatty(0) and os.isatty(1), 0
    while index < len(argv) and argv[index].startswith("-"):
        word, index = argv[index], index + 1
        if word in ("-h", "--help"):
            sys.stdout.write(USAGE)
            return 0
        if word == "--no-pty":
            terminal = False
        elif word in ("-C", "--directory") and index < len(argv):
            directory, index = argv[index], index + 1
        else:
            raise UsageError(
                "option-unknown", f"unknown option {word}, or its value is missing", remedy="cloister exec --help"
            )
    if index >= len(argv):
        raise UsageError("run-missing", "in which run?", remedy="cloister ps")
    run, words = argv[index], argv[index + 1 :]
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise UsageError(
            "command-missing", "which command?", remedy=f"cloister exec {run} -- ls, or cloister shell {run}"
        )
    return start(run, words, directory, terminal=terminal)


def start(run: str, words: list[str], directory: str, *, terminal: bool) -> int:
    """Ask for the command and become the shim."""
    fields = {"verb": "exec", "run": run, "directory": directory, "pty": "1" if terminal else ""}
    connection = client.request(fields, words, (0, 1, 2))
    client.become_shim(connection)
    return 125
