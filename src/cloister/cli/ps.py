"""`cloister ps`: list runs. What counts as alive is decided in `runs/listing.py`."""

from __future__ import annotations

import shlex
import shutil
import time

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.runs.listing import Row, list_runs


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "ps",
        "List runs.",
        prose=(
            "Without options only living runs are listed. A run whose broker was killed shows as `died`: the next "
            "start of any run undoes what it left and closes its record. BUDGET, where there is one, is the share of a "
            "budget of model calls that was passed last (`alerts`). `running, unrecorded` is a run whose doings the "
            "audit log does not get at present (`audit.on_failure`); --json says why."
        ),
        examples=(("cloister ps", "what runs now"), ("cloister ps --all --json", "everything on record, for programs")),
    )
    verb.add_argument("-a", "--all", action="store_true", help="finished runs too, with exit code and reason")
    verb.add_argument("-q", "--quiet", action="store_true", help="print only ids")
    verb.json_option(
        "id, agent, status, workspace, command, started, finished, exit_code, reason, denials, detached, mode, budget, "
        "unrecorded"
    )
    return verb


def main(argv: list[str]) -> int:
    """Print the list."""
    options = parser().read(argv)
    living = records.living()
    rows = list_runs(records.store(), living, everything=options.all)
    if options.json:
        output.print_json(rows)
    elif options.quiet:
        print("".join(f"{row.id}\n" for row in rows), end="")
    elif not rows:
        print("no runs" if options.all else "no living runs; `cloister ps --all` lists finished ones")
    else:
        print(_table(rows, everything=options.all))
    return 0


def _table(rows: list[Row], *, everything: bool) -> str:
    now = time.time()
    heads = ["RUN", "AGENT", "STATUS", "STARTED", "DENIED", "WORKSPACE", "COMMAND"]
    budgets = any(row.budget for row in rows)
    if budgets:
        heads.insert(5, "BUDGET")
    if everything:
        heads.insert(3, "EXIT")
    shown = []
    for row in rows:
        status = f"{row.status}, unrecorded" if row.unrecorded else row.status
        cells = [row.id, row.agent, status, output.ago(row.started, now), str(row.denials), place(row.workspace)]
        cells.append(shlex.join(row.command))
        if budgets:
            cells.insert(5, row.budget or "-")
        if everything:
            cells.insert(3, _exit(row))
        shown.append(cells)
    return output.table(heads, shown)


def place(path: str) -> str:
    """Return a directory's end, as much as leaves room for the command on a terminal; all of it for programs."""
    room = max(12, (shutil.get_terminal_size().columns - 60) // 2)
    return path if not output.is_terminal() or len(path) <= room else "…" + path[1 - room :]


def _exit(row: Row) -> str:
    if row.exit_code is None:
        return "-"
    return str(row.exit_code) if row.reason == "exited" else f"{row.exit_code} {row.reason}"
