"""`cloister doctor`: what this host can enforce and what it cannot, each with its remedy.

Exit status 0 when agents can run in namespaces here, 69 when they cannot. The facts are taken by
`host/probe.py` and judged by `runs/doctor.py`, ledger and keys looked at by `runs/doctor_models.py`, virtual
machines by `runs/doctor_vm.py`; here they are only asked for and shown.
"""

from __future__ import annotations

import os
import textwrap

import msgspec

from cloister.cli import records
from cloister.cli.arguments import Parser
from cloister.errors import CloisterError, UnsupportedError
from cloister.host.owner import identify
from cloister.host.probe import probe, probe_deep
from cloister.host.unit_probe import take_unit_facts
from cloister.plan.facts import HostFacts
from cloister.runs.doctor import EVERY_RUN, Finding, can_run, judge
from cloister.runs.doctor_models import model_findings
from cloister.runs.doctor_units import judge_units
from cloister.runs.doctor_vm import vm_findings

WIDTH = 100


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    can_run: bool
    findings: tuple[Finding, ...]
    facts: HostFacts


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "doctor",
        "Say what this host can enforce, and what to do about the rest.",
        prose=(
            "Looks at the kernel, bubblewrap, cgroups and the rest, and tries what can only be known by trying. Where "
            "the policy has providers, the ledger is opened and each key read by its reference; no key is shown."
        ),
        examples=(("cloister doctor", "can agents run here?"),),
        exits=(("69", "agents cannot run in namespaces here"),),
    )
    verb.json_option("can_run, findings, facts")
    verb.add_argument("--quick", action="store_true", help="only read and ask; start nothing, try nothing")
    return verb


def main(argv: list[str]) -> int:
    """Print the findings; return 0, or 69 (EX_UNAVAILABLE) when no agent can run in namespaces here.

    Raises:
        UsageError: an option is wrong.
    """
    arguments = parser().read(argv)
    facts = probe() if arguments.quick else probe_deep()
    units = judge_units(take_unit_facts(quick=arguments.quick))
    findings = judge(facts) + units + _of_user(quick=arguments.quick)
    works = can_run(findings)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(Report(works, findings, facts))).decode())
    else:
        print(render(findings))
    return 0 if works else UnsupportedError.exit_code


def _of_user(*, quick: bool) -> tuple[Finding, ...]:
    """Return what is found about this user's models, and about guests and images; nothing for one without a home."""
    try:
        places = records.places()
    except CloisterError:
        return ()  # no policy can be theirs, and the host is judged all the same
    found = model_findings(places, identify(places.home), os.environ, quick=quick)
    return found + vm_findings(places, os.environ, quick=quick)


def render(findings: tuple[Finding, ...]) -> str:
    """Return the findings as a table for people; remedies stay on one line each, to be copied."""
    names = max(len(finding.name) for finding in findings)
    marks = max(len(_mark(finding)) for finding in findings)
    lines = []
    for finding in findings:
        indent = " " * (names + marks + 4)
        head = f"{finding.name:<{names}}  {_mark(finding):<{marks}}  "
        meaning = _printable(finding.meaning)
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False)
        if finding.state != "ok":
            lines.append(f"{indent}needed for: {finding.needed_for}")
        if finding.remedy:
            lines.append(f"{indent}try: {_printable(finding.remedy)}")
    verdict = "agents can run here" if can_run(findings) else "agents cannot run here until what is MISSING is mended"
    return "\n".join([*lines, "", verdict])


def _mark(finding: Finding) -> str:
    """Return the state as a word; loud only where agents cannot run without."""
    if finding.state == "missing":
        return "MISSING" if finding.needed_for == EVERY_RUN else "absent"
    return finding.state


def _printable(text: str) -> str:
    """Escape control characters: parts of the text come from other programs."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
