"""A `SystemPlan` as text for people: what will be done, step by step, and every file as a unified difference.

Directories, links and lines of one kind are counted where there are many; no file is left out. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from cloister.plan.firewall import FILE
from cloister.plan.system import (
    AnySystemStep,
    InstallFile,
    LoadFirewall,
    MakeDirectory,
    MakeLink,
    RemoveDirectory,
    RemoveFile,
    RemoveLink,
    SystemPlan,
    UnloadFirewall,
)
from cloister.plan.textdiff import printable, unified

_MANY = 4
_COUNTED: tuple[tuple[type, str], ...] = (
    (MakeDirectory, "make {} directories: {} …"),
    (RemoveDirectory, "remove {} directories, where they are empty: {} …"),
    (MakeLink, "make {} links: {} …"),
    (RemoveLink, "remove {} links: {} …"),
)


def as_text(plan: SystemPlan) -> str:
    """Return the page that `setup`, `apply` and `uninstall` show before they ask."""
    if not plan.steps and not plan.notices:
        return "the system is as its policy says: nothing to do\n"
    shown = [text for step in plan.steps if (text := _difference(step))]
    lines = [*shown, *(["steps"] if plan.steps else []), *(f"  {line}" for line in _lines(plan.steps))]
    lines += ["", *(printable(notice) for notice in plan.notices)] if plan.notices else []
    return "\n".join(lines) + "\n"


def _difference(step: AnySystemStep) -> str:
    if not isinstance(step, InstallFile | RemoveFile | LoadFirewall | UnloadFirewall):
        return ""
    path = step.path if isinstance(step, InstallFile | RemoveFile) else FILE
    before = None if step.before is None else step.before.encode()
    after = step.text.encode() if isinstance(step, InstallFile | LoadFirewall) else None
    return unified(path.lstrip("/"), before, after)


def _lines(steps: Sequence[AnySystemStep]) -> list[str]:
    """Return one line for each step; neighbours of a kind that is many become one."""
    lines: list[str] = []
    place = 0
    while place < len(steps):
        step = steps[place]
        end = place
        while end < len(steps) and type(steps[end]) is type(step):
            end += 1
        words = next((words for kind, words in _COUNTED if isinstance(step, kind)), "")
        if words and end - place >= _MANY:
            lines.append(printable(words.format(end - place, getattr(step, "path", ""))))
            place = end
            continue
        lines.append(printable(step.describe()))
        place += 1
    return lines
