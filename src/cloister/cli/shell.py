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


def main(argv: list[str]) -> int:
    """Decide whether a run or an agent is meant; an id of a run is twelve characters of its own alphabet."""
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
    from cloister.runs.store import is_id

    return word == "last" or is_id(word)
