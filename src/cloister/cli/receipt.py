"""`cloister receipt`: what a finished run did, and under which rules, as one page."""

from __future__ import annotations

import shlex
from typing import Any

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import CloisterError, UsageError
from cloister.plan.steps import Plan
from cloister.runs.store import ModelUse, Receipt


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "receipt",
        "Show what a finished run did, and under which rules.",
        prose=(
            "A receipt names the digests (SHA-256) of the policy and of the plan, the host's facts, what enforced each "
            "limit, every opt-out, and what was refused. It is written at the end of the run; a run whose broker was "
            "killed gets one from the next broker, which says so. What model calls used is read from the ledger (see "
            "usage), and is on the page only."
        ),
        examples=(
            ("cloister receipt last", "the newest run"),
            ("cloister receipt last --json", "the same for programs"),
        ),
    )
    verb.run_argument()
    verb.json_option(
        "id, agent, preset, isolation, workspace, command, started, finished, exit_code, reason, policy_digest, "
        "plan_digest, host, probe, limits, opt_outs, notices, connections, denials, bytes_up, bytes_down, "
        "denied, warnings, credentials"
    )
    return verb


def main(argv: list[str]) -> int:
    """Print the receipt.

    Raises:
        UsageError: no such run, or it is not over.
    """
    options = parser().read(argv)
    store = records.store()
    run = store.find(options.run)
    receipt = store.receipt(run)
    if receipt is None:
        alive = run in (records.living() or ())
        remedy = (
            f"cloister stop {run}, or cloister inspect {run}"
            if alive
            else f"cloister stop {run}, which closes its record"
        )
        raise UsageError("run-not-over", f"{run} has no receipt yet", remedy=remedy)
    if options.json:
        output.print_json(receipt)
    else:
        print(page(receipt, model_calls(receipt, store.plan(run))))
    return 0


def model_calls(receipt: Receipt, plan: Plan | None) -> tuple[str, ...]:
    """Return what a run's model calls used, by the ledger as it is now; nothing for a run without models."""
    if plan is None or not plan.models:
        return ()
    if receipt.isolation == "unit":
        return (usage_words(receipt.model_use),)
    from cloister.cli.usage import of_run

    try:
        return (of_run(receipt.id, receipt.agent, receipt.started, receipt.finished),)
    except CloisterError as error:
        return (f"the ledger cannot be read now: {error.message} (cloister usage)",)


def usage_words(used: ModelUse | None) -> str:
    """Return what the calls of a unit used, which the system's broker has told: its ledger is not the user's."""
    if used is None:
        return "not known here: they are in the system's ledger (sudo cloister usage --system)"
    calls = f"{used.calls:,} call{'' if used.calls == 1 else 's'}"
    return f"{calls}, {used.tokens:,} tokens, ${used.cost_usd:,.4f}"


def page(receipt: Receipt, models: tuple[str, ...] = ()) -> str:
    """Return the receipt as people read it. Everything is cleaned: much of it came from the agent."""
    good = receipt.exit_code == 0 and receipt.reason == "exited"
    took = output.span(receipt.finished - receipt.started)
    head = output.pairs(
        (
            ("agent", receipt.agent + (f" (preset {receipt.preset})" if receipt.preset else "")),
            ("command", shlex.join(receipt.command)),
            ("workspace", receipt.workspace),
            ("started", output.moment(receipt.started)),
            ("finished", f"{output.moment(receipt.finished)}, after {took}"),
            ("exit", f"{receipt.exit_code} ({receipt.reason})"),
            ("isolation", receipt.isolation),
            ("policy", f"sha256 {receipt.policy_digest}"),
            ("plan", f"sha256 {receipt.plan_digest}"),
            ("host", host_words(receipt.host)),
        )
    )
    traffic = (
        f"{receipt.connections} connections, {receipt.denials} refused, "
        f"{output.size(receipt.bytes_up)} up, {output.size(receipt.bytes_down)} down"
    )
    parts = [
        output.colour(f"receipt of run {receipt.id}", "green" if good else "yellow"),
        head,
        section("opt-outs", receipt.opt_outs or ("none",), "yellow" if receipt.opt_outs else ""),
        section("self-probe before the agent started", receipt.probe or ("no answer",)),
        section("limits", receipt.limits or ("none",)),
        section("egress", (traffic,)),
        section("credentials", receipt.credentials),
        section("model calls", models),
        section("denied", receipt.denied, "red"),
        section("notices", receipt.notices),
        section("warnings", receipt.warnings, "yellow"),
    ]
    return "\n\n".join(part for part in parts if part)


def section(title: str, entries: tuple[str, ...], shade: str = "") -> str:
    """Return a titled list, or nothing when it is empty."""
    if not entries:
        return ""
    return "\n".join(
        [output.colour(title, shade) if shade else title, *(f"  {output.clean(entry)}" for entry in entries)]
    )


def host_words(host: dict[str, Any]) -> str:
    """Return the host's facts in one line."""
    return ", ".join(f"{name} {value}" for name, value in host.items())
