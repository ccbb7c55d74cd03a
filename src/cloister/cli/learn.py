"""`cloister learn`: what a run would have needed, as a change of the policy; made only when asked for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.cli.init import write_private
from cloister.egress.proposal import propose
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import CloisterError, RetryError, StepError, UnsupportedError, UsageError
from cloister.policy.load import load
from cloister.runs.edit_policy import add_allow
from cloister.runs.policies import PolicyFiles, read_trusted
from cloister.runs.wishes import Wish, egress_events, wishes


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "learn",
        "Propose a policy from what a run wanted.",
        prose=(
            'Made for runs with `mode = "learn"` or "ask", and of use after any run that was refused something: prints '
            "the hosts that no rule names as a difference of the policy file. Proposals hold exact names and ports; a "
            "wildcard is a person's decision. With --write the user's file is changed, its comments and layout kept, "
            "and the old one stays beside it."
        ),
        examples=(("cloister learn last", "look"), ("cloister learn last --write", "accept")),
    )
    verb.run_argument()
    verb.add_argument("--write", action="store_true", help="change the policy file, keeping a backup")
    verb.json_option("run, agent, file, entries, skipped, written, backup")
    return verb


def main(argv: list[str]) -> int:
    """Print the proposal, and write it when asked to.

    Raises:
        UsageError: no such run, or its agent is not in the user's policy.
        UnsupportedError: the file is not laid out so that a program may edit it.
    """
    options = parser().read(argv)
    store, places = records.store(), records.places()
    run = store.find(options.run)
    record = store.record(run)
    if record is None:
        raise StepError("record-missing", f"{run} was killed before its record was written", remedy="cloister gc")
    files = PolicyFiles(places, os.getuid())
    resolved = files.resolve(record.agent)
    events = egress_events(store, run)
    egress = resolved.agent.egress
    found = wishes(events, compile_ruleset(egress, agent=record.agent), compile_guard(egress, agent=record.agent))
    entries = [one.line.strip('"') for one in found if not one.obstacle]
    backup, written = "", False
    if entries and options.write:
        backup, written = _write(places.policy, record.agent, entries, files), True
    if options.json:
        shown = {"run": run, "agent": record.agent, "file": places.policy, "entries": entries}
        skipped = [one for one in found if one.obstacle]
        output.print_json(shown | {"skipped": skipped, "written": written, "backup": backup})
        return 0
    _explain(found, run)
    if written:
        print(f"added {', '.join(entries)} to {output.clean(places.policy)}; the old file is {output.clean(backup)}")
        print("next: cloister policy reload brings it to running sandboxes")
    elif entries:
        allow = [entry for entry in egress.allow if isinstance(entry, str)]
        print(_difference(places.policy, record.agent, entries, propose(events, allow, agent=record.agent)), end="")
    return 0


def _explain(found: list[Wish], run: str) -> None:
    if not found:
        print(f"{run} wanted nothing that the policy does not allow already")
    for one in found:
        if one.obstacle:
            print(output.clean(f"not proposed: {one.line}: {one.obstacle}"))


def _difference(path: str, agent: str, entries: list[str], fallback: str) -> str:
    """Return the change of the real file; where a program may not make it, the change in general terms."""
    try:
        old = _text(path, agent)
        new = add_allow(old, agent, entries, name=path)
    except (UnsupportedError, UsageError):
        return "".join(f"{output.clean(line)}\n" for line in fallback.splitlines())
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), path, f"{path} (proposed)", lineterm="")
    return "".join(f"{output.clean(line)}\n" for line in lines)


def _text(path: str, agent: str) -> str:
    source = read_trusted(path, os.getuid())
    text = source.text.decode("utf-8") if source else ""
    policy = load(text, path) if source else None
    if policy is None or agent not in policy.agents:
        remedy = "the system's policy is its administrator's to change"
        raise UsageError("agent-not-yours", f"{agent!r} is not in your own policy", where=path, remedy=remedy)
    if text.lstrip().startswith("{"):
        raise UnsupportedError(
            "policy-generated", "a policy in JSON is made by a program", where=path, remedy="change it there"
        )
    return text


def _write(path: str, agent: str, entries: list[str], files: PolicyFiles) -> str:
    """Change the file by rename, unless it changed meanwhile or would be wrong afterwards; return the backup."""
    old = _text(path, agent)
    new = add_allow(old, agent, entries, name=path)
    load(new, path, preset_names=tuple(files.presets()))
    real = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    if real.read_text(encoding="utf-8") != old:
        raise RetryError(
            "policy-changed", "the file was changed by somebody else just now", where=path, remedy="try again"
        )
    try:
        backup = write_private(real, new)
    except OSError as error:
        raise StepError("policy-not-written", f"cannot write the policy: {error.strerror}", where=str(real)) from error
    try:
        PolicyFiles(records.places(), os.getuid()).resolve(agent)
    except CloisterError:
        Path(backup).replace(real)
        raise
    return backup
