"""What can go wrong, whom it concerns, and what to try.

    CloisterError
    ├── UsageError         64  the command line is wrong
    ├── UnsupportedError   69  this host, or this version, cannot enforce the policy
    ├── StepError          71  the host refused a step of a plan
    ├── RetryError         75  passing trouble: the same call may work later
    ├── DeniedError        77  the policy does not allow it
    └── PolicyError        78  a policy file is wrong; carries every mistake found

A class exists only where the reader must act differently. Exit codes are those of
sysexits(3); `run`, `exec` and `shell` turn all of them into 125, so that a caller can tell
our failure from the command's (DESIGN section 12). Bugs are not in the tree: they leave a
traceback and 70. Nothing here prints or exits: that is for `cli` to do.
"""

from __future__ import annotations

from typing import NamedTuple

EXIT_BUG = 70


class Problem(NamedTuple):
    """One mistake in a policy: what is wrong, where it stands, and what to write instead."""

    message: str
    where: str = ""
    remedy: str = ""


class CloisterError(Exception):
    """Something a person can act upon.

    Attributes:
        reference: kebab-case name, stable, listed in cloister(1).
        message: what is wrong, in one sentence without a full stop.
        where: the file, line and key, the path or the host it concerns; may be empty.
        remedy: a command to type or an edit to make; may be empty.
    """

    exit_code = EXIT_BUG

    def __init__(self, reference: str, message: str, *, where: str = "", remedy: str = "") -> None:
        """Keep the four parts apart; `render` joins them."""
        super().__init__(message)
        self.reference = reference
        self.message = message
        self.where = where
        self.remedy = remedy


class UsageError(CloisterError):
    """The command line is wrong."""

    exit_code = 64


class UnsupportedError(CloisterError):
    """This host or this version cannot enforce what the policy asks for, so nothing was started."""

    exit_code = 69


class StepError(CloisterError):
    """The host refused a step of a plan; the steps before it have been undone."""

    exit_code = 71


class RetryError(CloisterError):
    """Passing trouble: the same call may work later."""

    exit_code = 75


class DeniedError(CloisterError):
    """The policy does not allow it."""

    exit_code = 77


class PolicyError(CloisterError):
    """A policy file is wrong. `problems` holds every mistake, not only the first."""

    exit_code = 78

    def __init__(self, problems: list[Problem] | tuple[Problem, ...], *, reference: str = "policy-invalid") -> None:
        """Take at least one problem; the first gives the message, the first word of the reference what it is about."""
        first = problems[0]
        count = len(problems)
        message = first.message if count == 1 else f"the {reference.partition('-')[0]} has {count} mistakes"
        super().__init__(reference, message, where=first.where if count == 1 else "", remedy=first.remedy)
        self.problems = tuple(problems)


def render(error: CloisterError) -> str:
    """Return the text shown to a person: reference, message, then one indented line per part.

    The same text goes to terminals and logs, so it holds no colour and no control characters.
    """
    lines = [f"cloister: {error.message} [{error.reference}]"]
    problems = error.problems if isinstance(error, PolicyError) else ()
    if len(problems) > 1:
        for problem in problems:
            place = f"{problem.where}: " if problem.where else ""
            lines.append(f"  {place}{problem.message}")
            if problem.remedy:
                lines.append(f"    try: {problem.remedy}")
    else:
        if error.where:
            lines.append(f"  where: {error.where}")
        if error.remedy:
            lines.append(f"  try: {error.remedy}")
    return "\n".join(_printable(line) for line in lines)


def as_json(error: CloisterError) -> dict[str, object]:
    """Return the error as plain data for `--json`."""
    shown: dict[str, object] = {
        "reference": error.reference,
        "message": error.message,
        "where": error.where,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
    }
    if isinstance(error, PolicyError):
        shown["problems"] = [problem._asdict() for problem in error.problems]
    return shown


def _printable(line: str) -> str:
    """Escape control characters and lone surrogates: part of the text may be a hostile file name."""
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode("ascii") for char in line
    )
