"""The battery's result as text, JSON or JUnit, and its exit code. Prints nothing itself."""

from __future__ import annotations

from collections import Counter
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from cloister.prove.case import Case
from cloister.prove.runner import OUTCOMES, Result

EXIT_DENIED, EXIT_ALLOWED, EXIT_NOT_RUN = 0, 1, 69
_MARKS = {
    "denied": "denied  ",
    "warned": "WARNED  ",
    "allowed": "ALLOWED ",
    "error": "ERROR   ",
    "cannot-run": "not run ",
    "opted-out": "opted out",
    "not-in-policy": "-",
}
_JUNIT = {"allowed": "failure", "error": "error"} | dict.fromkeys(
    ("cannot-run", "opted-out", "not-in-policy"), "skipped"
)


def exit_code(results: list[Result]) -> int:
    """Return 0 when nothing got through, 1 when an attack did, 69 when some prove nothing."""
    outcomes = {result.outcome for result in results}
    if "allowed" in outcomes:
        return EXIT_ALLOWED
    if outcomes & {"error", "cannot-run"} or "denied" not in outcomes:
        return EXIT_NOT_RUN
    return EXIT_DENIED


def line(result: Result) -> str:
    """Return one line: outcome, case, and what stopped it."""
    return f"  {_MARKS[result.outcome]:9} {result.case.id:32} {printable(brief(result), 150)}"


def brief(result: Result) -> str:
    """Return the detail; of what was stopped, by what first: `EPERM: mount tmpfs, fsopen`."""
    if result.outcome != "denied":
        return result.detail
    grouped: dict[str, list[str]] = {}
    for part in result.detail.split("; "):
        what, _, by = part.rpartition(": ")
        grouped.setdefault(by, []).append(what)
    return "; ".join(f"{by}: {', '.join(filter(None, what))}" if any(what) else by for by, what in grouped.items())


def text(results: list[Result], promises: dict[str, str]) -> str:
    """Return the whole table, grouped by promise."""
    lines = []
    shown = [result for result in results if result.outcome != "not-in-policy"]
    for number in sorted({result.case.promise for result in shown}):
        lines.append(f"{number} {promises.get(number, '')}".rstrip())
        lines += [line(result) for result in shown if result.case.promise == number]
        lines.append("")
    return "\n".join([*lines, summary(results)])


def summary(results: list[Result]) -> str:
    """Return the last line; whatever is not a pass is named."""
    counts = Counter(result.outcome for result in results)
    absent = counts.pop("not-in-policy", 0)
    words = [f"{counts[name]} {name}" for name in OUTCOMES if counts[name] or name == "denied"]
    lines = [f"{counts.total()} attacks: {', '.join(words)}"]
    if absent:
        lines[0] += f" ({absent} more are for what this policy does not have)"
    if counts["allowed"]:
        lines.append(
            "ATTACKS GOT THROUGH: " + ", ".join(result.case.id for result in results if result.outcome == "allowed")
        )
    if warned := [result.case.id for result in results if result.outcome == "warned"]:
        lines.append("not prevented, but reported when the run ends: " + ", ".join(warned))
    if unclear := [result.case.id for result in results if result.outcome in ("error", "cannot-run")]:
        lines.append("not proved: " + ", ".join(unclear))
    return "\n".join(lines)


def as_json(results: list[Result], agent: str) -> dict[str, Any]:
    """Return plain data: one object per case, and the counts."""
    cases = [
        {**describe(result.case), "outcome": result.outcome, "detail": result.detail, "twin": result.twin,
         "seconds": round(result.seconds, 3)}
        for result in results
    ]  # fmt: skip
    return {
        "agent": agent,
        "counts": dict(Counter(result.outcome for result in results)),
        "exit_code": exit_code(results),
        "cases": cases,
    }


def describe(case: Case) -> dict[str, Any]:
    """Return a case's header as plain data."""
    return {
        "id": case.id,
        "title": case.title,
        "promise": case.promise,
        "classes": list(case.classes),
        "expect": case.expect,
    }


def listing(cases: list[Case]) -> list[str]:
    """Return a line per case: its id, the promise it proves, its title."""
    return [f"{case.id:30} {case.promise}  {case.title}" for case in cases]


def junit(results: list[Result], agent: str) -> str:
    """Return JUnit XML: what got through is a failure, what proved nothing an error, what was not tried a skip."""
    counts = Counter(result.outcome for result in results)
    skipped = counts["cannot-run"] + counts["opted-out"] + counts["not-in-policy"]
    head = (
        f'<testsuite name={quoteattr(f"cloister prove {agent}")} tests="{len(results)}" failures="{counts["allowed"]}" '
    )
    lines = ['<?xml version="1.0" encoding="utf-8"?>', head + f'errors="{counts["error"]}" skipped="{skipped}">']
    for result in results:
        detail = printable(result.detail, 4000)
        where = f"classname={quoteattr(result.case.promise)} name={quoteattr(result.case.id)}"
        name = f'<testcase {where} time="{result.seconds:.3f}">'
        kind = _JUNIT.get(result.outcome)
        inner = f"<{kind} message={quoteattr(detail[:200])}>{escape(detail)}</{kind}>" if kind else ""
        lines.append(f"  {name}{inner or f'<system-out>{escape(detail)}</system-out>'}</testcase>")
    return "\n".join([*lines, "</testsuite>", ""])


def printable(text: str, limit: int) -> str:
    """Return text fit for a terminal and for XML: what came out of the sandbox is not trusted."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
