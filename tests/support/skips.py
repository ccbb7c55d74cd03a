"""Skips in CI: each is a failure unless `tests/allowed_skips.toml` names the test and gives a reason.

A test that quietly stops running proves nothing. Outside CI a skip stays a skip. Expected
failures (xfail) are not skips.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class AllowedSkip:
    """One entry: tests by pattern (`tests/kernel/test_x.py::*`), and why they may be skipped in CI."""

    test: str
    reason: str


def load(path: Path) -> tuple[AllowedSkip, ...]:
    """Read the list; an unknown key, or an entry without a reason, raises ValueError."""
    entries = []
    for raw in tomllib.loads(path.read_text(encoding="utf-8")).get("skip", []):
        if set(raw) != {"test", "reason"} or not all(isinstance(value, str) and value for value in raw.values()):
            raise ValueError(f"{path.name}: each [[skip]] has exactly `test` and `reason`: {raw}")
        entries.append(AllowedSkip(**raw))
    return tuple(entries)


def is_allowed(node: str, entries: tuple[AllowedSkip, ...]) -> bool:
    """Tell whether a test may be skipped in CI."""
    # Brackets of parametrised names are plain text here, not a pattern's.
    return any(fnmatchcase(node.replace("[", "("), entry.test.replace("[", "(")) for entry in entries)
