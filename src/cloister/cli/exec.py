"""`cloister exec`: run another command in a running sandbox."""

from __future__ import annotations

import sys

from cloister.runs import client, words

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
    """Ask the broker and become the shim.

    Raises:
        UsageError: the words are wrong.
    """
    if words.expand({"verb": "exec"}, argv) is None:
        sys.stdout.write(USAGE)
        return 0
    client.become_shim(client.request_raw("exec", argv))
    return 125


def start(run: str, command: list[str], directory: str, *, terminal: bool) -> int:
    """Ask for the command and become the shim."""
    fields = {"verb": "exec", "run": run, "directory": directory, "pty": "1" if terminal else ""}
    connection = client.request(fields, command, (0, 1, 2))
    client.become_shim(connection)
    return 125
