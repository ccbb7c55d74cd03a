"""`cloister why`: what a run was refused, by which rule, and the line that would allow it."""

from __future__ import annotations

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import StepError
from cloister.runs.signing_review import SigningDenial, signing_denials
from cloister.runs.wishes import denials, egress_events


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "why",
        "List what a run was denied, and the line that would allow it.",
        prose=(
            "One entry per host, port and reason. A line that would allow it is given where one would; a deny rule, "
            "a private address or a malformed name needs another change, which is named instead. Signatures "
            "that were refused follow, one entry per reason and key."
        ),
        examples=(("cloister why last", "why did that not work?"),),
    )
    verb.run_argument()
    verb.json_option(
        "run, agent, denials (host, port, reason, times, rule, line, remedy, request), "
        "signing (reason, use, key, times, explanation, remedy)"
    )
    return verb


def main(argv: list[str]) -> int:
    """Print the denials.

    Raises:
        UsageError: no such run.
        StepError: the run has no record.
    """
    options = parser().read(argv)
    store = records.store()
    run = store.find(options.run)
    record = store.record(run)
    if record is None:
        raise StepError("record-missing", f"{run} was killed before its record was written", remedy="cloister gc")
    found = denials(egress_events(store, run), record.agent)
    unsigned = signing_denials(store, run)
    if options.json:
        output.print_json({"run": run, "agent": record.agent, "denials": found, "signing": unsigned})
        return 0
    if not found and not unsigned:
        print(f"{run} was denied nothing")
    for one in found:
        place = output.colour(output.clean(f"{one.host}:{one.port}"), "red")
        print(f"{place}  {output.clean(one.reason)}, {_times(one.times)}")
        for title, text in (("first", one.request), ("rule", one.rule), ("try", one.remedy)):
            if text:
                print(f"  {title}: {output.clean(text)}")
    if any(one.line for one in found):
        print(f"\n`cloister learn {run}` shows these lines as a change of the policy, --write makes it")
    for refused in unsigned:
        _show_signing(refused)
    return 0


def _show_signing(one: SigningDenial) -> None:
    what = " ".join(part for part in ("signature", f"for {one.use}" if one.use else "", one.key) if part)
    print(f"{output.colour(output.clean(what), 'red')}  {output.clean(one.reason)}, {_times(one.times)}")
    for title, text in (("why", one.explanation), ("try", one.remedy)):
        if text:
            print(f"  {title}: {output.clean(text)}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
