"""`cloister stop`: end runs through their broker, and wait until they are over."""

from __future__ import annotations

import sys
import time

from cloister.cli import records
from cloister.cli.arguments import Parser, duration
from cloister.errors import RetryError, UsageError
from cloister.runs.store import Store

GRACE_S = 10.0
_AFTER_GRACE_S = 15.0
"""What ending may take beyond the grace: killing, undoing the plan, writing the receipt."""
_POLL_S = 0.05


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "stop",
        "End runs, and wait until they are over.",
        prose=(
            "The agent gets SIGTERM; when the grace is over (`0`: at once), everything in its sandbox is killed. A run "
            "that is over already is no mistake."
        ),
        examples=(
            ("cloister stop last", "end the newest run"),
            ("cloister stop --all --grace 2s", "end every run soon"),
        ),
    )
    verb.add_argument("run", metavar="RUN", nargs="*", help="ids of runs, their beginnings, or `last`")
    verb.add_argument("-a", "--all", action="store_true", help="every living run")
    verb.add_argument("--grace", type=_grace, default=GRACE_S, metavar="TIME", help="time to end in order (10s)")
    verb.json_option("run, exit_code, reason (a list)")
    return verb


def _grace(text: str) -> float:
    return 0.0 if text in {"0", "0s"} else duration(text)


def main(argv: list[str]) -> int:
    """Ask the broker, then wait.

    Raises:
        UsageError: no run given, or no such run.
        RetryError: a run did not end in time.
    """
    options = parser().read(argv)
    store = records.store()
    if bool(options.run) == options.all:
        raise UsageError("run-missing", "name the runs to end, or --all", remedy="cloister stop last")
    runs = sorted(records.living() or ()) if options.all else [store.find(prefix) for prefix in options.run]
    for run in runs:
        _ask(store, run, options.grace)
    ended = [_wait(store, run, options.grace + _AFTER_GRACE_S) for run in runs]
    if options.json:
        from cloister.cli.output import print_json

        print_json(ended)
    else:
        for one in ended:
            print(f"{one['run']} is over: {one['reason']}, exit code {one['exit_code']}")
        if not ended:
            print("no living runs")
    return 0


def _ask(store: Store, run: str, grace_s: float) -> None:
    if _over(store, run):
        return
    try:
        records.control({"verb": "stop", "run": run, "grace": f"{grace_s:g}"})
    except records.BrokerError as error:
        # It ended in between, or its broker was killed and this request's broker has closed the record.
        if error.reference != "run-not-alive" or not _over(store, run):
            raise


def _over(store: Store, run: str) -> bool:
    record = store.record(run)
    return record is None or record.status == "finished"


def _wait(store: Store, run: str, limit_s: float) -> dict[str, object]:
    begin = time.monotonic()
    noted = False
    while not _over(store, run):
        waited = time.monotonic() - begin
        if waited > limit_s:
            raise RetryError(
                "stop-slow", f"{run} is not over after {waited:.0f} s", remedy=f"cloister stop --grace 1s {run}"
            )
        if waited > 1 and not noted:
            sys.stderr.write(f"cloister: waiting for {run} to end\n")
            noted = True
        time.sleep(_POLL_S)
    record = store.record(run)
    return {"run": run, "exit_code": record.exit_code if record else None, "reason": record.reason if record else ""}
