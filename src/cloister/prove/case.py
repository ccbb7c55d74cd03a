"""A case as the host sees it: a header of constants, and the text of a program. Read with `ast`, never imported.

What a case may say in its header stands in `Case`; what it may do inside stands in
`inside/support.py`. Nothing is run here.
"""

from __future__ import annotations

import ast
import os
from typing import Any

import msgspec

CASES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cases")


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attack. Field names in capitals are the constants of the file."""

    id: str
    title: str
    promise: str
    """Number of the promise in SPECIFICATION.md."""
    classes: tuple[int, ...]
    """Numbers of the attack classes in SECURITY.md."""
    expect: str
    """In words: what stops it."""
    needs: tuple[str, ...] = ()
    """What the host prepares (`needs.py`, `canaries.py`)."""
    shape: str = "clone"
    """The workspace: `any` (also the user's own, with --here), `clone`, `full` (every protected name present),
    `worktree`, `plain` (no repository)."""
    stages: tuple[str, ...] = ("attack",)
    """Functions to call, each in a run of its own where there are several."""
    fresh: bool = False
    """The case gets runs and a workspace of its own, and its checks come after the run has ended."""
    procedure: str = "in-turn"
    """How the host leads a case that is alone (`procedures.py`)."""
    warned_of: str = ""
    """For what mounts cannot prevent: the run's receipt must warn of this name, then the outcome is `warned`."""
    checks: tuple[str, ...] = ()
    """Consequences to look for on the host (`consequences.py`)."""
    if_policy: tuple[str, ...] = ()
    """Words of what the agent's policy has (`battery.holds`); where it has none of them, there is nothing to attack."""
    ended_by: str = ""
    """Reference of the error with which this attack may end its run: then it was refused, and the run with it."""
    lifted_by: tuple[str, ...] = ()
    """Keys of the policy that allow this on purpose."""
    arch: tuple[str, ...] = ()
    """Machines it exists for; empty means all."""
    limit_s: float = 8.0
    source: str = ""

    @property
    def alone(self) -> bool:
        """Whether it cannot share a run with other cases."""
        return self.fresh or len(self.stages) > 1 or self.procedure != "in-turn"


def parse(text: str, name: str) -> Case:
    """Read a case file.

    Raises:
        ValueError: the header is not what a header must be.
    """
    header: dict[str, Any] = {"source": text}
    tree = ast.parse(text, name)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            key = node.targets[0].id.lower()
            if key in Case.__struct_fields__:
                header[key] = ast.literal_eval(node.value)
    try:
        case = msgspec.convert(header, Case)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from error
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    missing = set(case.stages) - functions
    if missing:
        raise ValueError(f"{name}: no function {', '.join(sorted(missing))}")
    return case


def load(directory: str = CASES) -> dict[str, Case]:
    """Return all cases by id, in the order of their names.

    Raises:
        ValueError: a file is no case, or its ID is not its name.
    """
    cases = {}
    for name in sorted(os.listdir(directory)):
        if not name.endswith(".py") or name.startswith("_"):
            continue
        with open(os.path.join(directory, name), encoding="utf-8") as file:
            case = parse(file.read(), name)
        if case.id != name.removesuffix(".py").replace("_", "-"):
            raise ValueError(f"{name}: its ID is {case.id}")
        cases[case.id] = case
    return cases
