"""`cloister run`: start an agent in its sandbox.

Reached when no broker answered the front door (`host/shim/client.c`), and for help and the dry
run. Everything that needs thought happens in the broker.
"""

from __future__ import annotations

import sys

from cloister.runs import client, words

USAGE = """\
usage: cloister run [OPTIONS] AGENT [ARGUMENT...]
       cloister run [OPTIONS] AGENT -- COMMAND [ARGUMENT...]

Start AGENT in its sandbox. ARGUMENTs are appended to the agent's own command;
after `--`, COMMAND is run instead of it, in the same sandbox.

options:
  -C, --directory DIR   start in DIR instead of the current directory
      --profile NAME    lay [profiles.NAME] of the policy over the agent
  -e, --env NAME        carry the variable NAME in from the environment (repeatable)
  -y, --yes             do not ask about the environment that is carried in
  -d, --detach          leave it running and print its id; output goes to `cloister logs`
      --no-pty          use pipes even on a terminal
      --dry-run         print the plan and start nothing (`cloister plan`)
      --json            with --dry-run or --detach: print JSON
  -h, --help            show this text

exit codes: the command's own; 124 timed out, 125 cloister failed, 126 cannot be
executed, 127 not found, 128+n ended by signal n.
"""


def main(argv: list[str]) -> int:
    """Ask the broker and become the shim; help and the dry run are done here.

    Raises:
        UsageError: the words are wrong.
    """
    options, agent, words_after, replaced = words.parse(argv)
    if "help" in options:
        sys.stdout.write(USAGE)
        return 0
    if agent and "dry-run" in options:
        from cloister.cli import plan

        return plan.show(options, agent, words_after, replaced=replaced)
    connection = client.request_raw("run", argv)
    client.become_shim(connection)
    return 125
