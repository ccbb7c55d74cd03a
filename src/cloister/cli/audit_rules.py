"""`cloister audit rules`: which detections are in force, and what becomes of each."""

from __future__ import annotations

import argparse
import os

import msgspec

from cloister.audit.detect_rules import rules_of, shipped
from cloister.cli import audit_options, output, records
from cloister.cli.arguments import Parser
from cloister.errors import PolicyError
from cloister.policy.load import load
from cloister.policy.model import Audit
from cloister.runs.paths import SYSTEM_POLICY
from cloister.runs.policies import read_trusted


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    parser = audit_options.action(actions, "rules", "list the detections in force, and what becomes of each")
    parser.add_argument("--system", action="store_true", help="by the system's policy")
    parser.add_argument("--json", action="store_true", help="print JSON with the key rules (as in cloister.toml(5))")


def main(options: argparse.Namespace) -> int:
    """List them.

    Raises:
        PolicyError: the policy, or a rule in it, is wrong.
    """
    audit = _audit(SYSTEM_POLICY if options.system else records.places().policy)
    rules = [held.rule for held in rules_of(audit)]
    if options.json:
        output.print_json({"rules": [msgspec.to_builtins(rule) for rule in rules]})
        return 0
    own = {rule.name for rule in shipped()}
    rows = [
        (
            rule.name,
            rule.severity,
            rule.action,
            "" if rule.name in own else "yours",
            rule.title or ", ".join(rule.kinds),
        )
        for rule in rules
    ]
    print(output.table(("NAME", "SEVERITY", "ACTION", "FROM", "WHAT"), rows))
    if off := [name for name, action in audit.detections.items() if action == "off"]:
        print(output.colour(f"off: {', '.join(off)}", "dim"))
    return 0


def _audit(path: str) -> Audit:
    """Return `[audit]` of a policy; the defaults where there is none."""
    try:
        source = read_trusted(path, os.getuid())
    except PolicyError as error:
        if error.reference == "policy-missing":
            return Audit()
        raise
    return load(source.text, path).audit if source else Audit()
