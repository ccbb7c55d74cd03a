"""`cloister shell`: a shell in an agent's sandbox, or in one that is running."""

from __future__ import annotations

import os
import sys

from cloister.cli import exec as exec_verb
from cloister.cli import run as run_verb
from cloister.errors import UsageError

USAGE = """\
usage: cloister shell [OPTIONS] [AGENT]
       cloister shell RUN

Open an interactive shell in the sandbox that AGENT would get (default: `shell`),
or in the sandbox of RUN while it lasts. OPTIONS are those of `cloister run`.
"""
_RUN_ID_LENGTH = 10


def main(argv: list[str]) -> int:
    """Decide whether a run or an agent is meant; ids of runs are ten characters and begin with a letter and digits."""
    if argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return 0
    if argv and _is_run(argv[-1]):
        return exec_verb.start(argv[-1], ["/bin/sh", "-i"], "", terminal=os.isatty(0) and os.isatty(1))
    options = [word for word in argv if word.startswith("-")]
    agents = [word for word in argv if not word.startswith("-")]
    if len(agents) > 1:
        raise UsageError("too-many-words", "one agent, or one run", remedy="cloister run AGENT -- COMMAND")
    return run_verb.main([*options, *(agents or ["shell"]), "--", "/bin/sh", "-i"])


def _is_run(word: str) -> bool:
    return word == "last" or (len(word) == _RUN_ID_LENGTH and word.isalnum() and any(char.isdigit() for char in word))
