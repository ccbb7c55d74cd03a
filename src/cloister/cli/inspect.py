"""`cloister inspect`: everything on record about a run, living or finished, or one part of it."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.cli.receipt import model_calls, page, section
from cloister.errors import StepError
from cloister.plan import render
from cloister.plan.steps import Plan
from cloister.runs.listing import Row, row_of
from cloister.runs.store import Receipt, Store


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints."""

    run: Row
    plan: Plan | None
    receipt: Receipt | None
    plan_digest: str
    files: dict[str, str]
    """Where the records are: directory, events, and the output of a detached run."""


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "inspect",
        "Show everything known about a run.",
        examples=(
            ("cloister inspect last", "state, rules and files of the newest run"),
            ("cloister inspect last --argv", "the exact command line of bubblewrap"),
        ),
    )
    verb.run_argument()
    part = verb.add_mutually_exclusive_group()
    part.add_argument("--argv", action="store_true", help="only the command line of the sandbox, as a shell reads it")
    part.add_argument("--plan", action="store_true", help="only the plan, step by step")
    part.add_argument("--egress", action="store_true", help="only what may be reached, and what was tried")
    verb.json_option("run, plan, receipt, plan_digest, files")
    return verb


def main(argv: list[str]) -> int:
    """Print what is asked for.

    Raises:
        UsageError: no such run.
        StepError: its plan was never completely written.
    """
    options = parser().read(argv)
    store = records.store()
    run = store.find(options.run)
    if options.argv or options.plan:
        plan = _plan(store, run)
        if options.json:
            print(render.as_json(plan).decode() if options.plan else msgspec.json.encode(plan.launch.argv).decode())
        else:
            print(output.clean(render.command_line(plan.launch)) if options.argv else _page(plan))
    elif options.egress:
        _egress(store, run, as_json=options.json)
    else:
        _everything(store, run, as_json=options.json)
    return 0


def _plan(store: Store, run: str) -> Plan:
    plan = store.plan(run)
    if plan is None:
        raise StepError("plan-missing", f"{run} was killed before its plan was written", remedy="cloister gc")
    return plan


def _page(plan: Plan) -> str:
    return "\n".join(output.clean(line) for line in render.as_text(plan).splitlines())


def _everything(store: Store, run: str, *, as_json: bool) -> None:
    record, plan, receipt = store.record(run), store.plan(run), store.receipt(run)
    if record is None:
        raise StepError("record-missing", f"{run} was killed before its record was written", remedy="cloister gc")
    row = row_of(store, record, records.living())
    files = {"directory": f"{store.directory}/{run}", "events": store.events_path(run)}
    if Path(store.output_path(run)).exists():
        files["output"] = store.output_path(run)
    if as_json:
        digest = plan.digest() if plan else ""
        output.print_json(Inspection(run=row, plan=plan, receipt=receipt, plan_digest=digest, files=files))
        return
    if receipt:
        print(page(receipt, model_calls(receipt, plan)))
    else:
        print(_living(row, plan))
    print("\n" + section("files", tuple(f"{name:<9}  {path}" for name, path in files.items())))


def _living(row: Row, plan: Plan | None) -> str:
    """Return the page of a run that is not over."""
    head = output.pairs(
        (
            ("agent", row.agent),
            ("command", shlex.join(row.command)),
            ("workspace", f"{row.workspace} ({row.mode})"),
            ("started", f"{output.moment(row.started)}, {output.ago(row.started, time.time())}"),
            ("status", row.status + (", detached" if row.detached else "")),
            ("denied", str(row.denials)),
            ("budget", row.budget and f"{row.budget} passed"),
            ("policy", f"sha256 {plan.policy_digest}" if plan else ""),
            ("plan", f"sha256 {plan.digest()}" if plan else ""),
        )
    )
    parts = [output.colour(f"run {row.id}", "bold"), head]
    if plan:
        parts.append(section("opt-outs", plan.opt_outs or ("none",), "yellow" if plan.opt_outs else ""))
        parts += [section("limits", plan.limits), section("egress", plan.egress or ("nothing is reachable",))]
        parts.append(section("notices", plan.notices))
    return "\n\n".join(part for part in parts if part)


def _egress(store: Store, run: str, *, as_json: bool) -> None:
    plan = store.plan(run)
    events = [event for event in store.events(run) if event.get("event") == "egress"]
    tried: dict[tuple[Any, ...], int] = {}
    for event in events:
        key = tuple(str(event.get(name, "")) for name in ("verdict", "host", "port", "reason", "rule"))
        tried[key] = tried.get(key, 0) + 1
    if as_json:
        output.print_json({"rules": plan.egress if plan else (), "events": events})
        return
    print(section("rules", plan.egress if plan and plan.egress else ("nothing is reachable",)))
    rows = [
        [verdict, f"{host}:{port}", str(count), reason, rule]
        for (verdict, host, port, reason, rule), count in tried.items()
    ]
    print("\n" + (output.table(["VERDICT", "HOST", "COUNT", "REASON", "RULE"], rows) if rows else "nothing was tried"))
