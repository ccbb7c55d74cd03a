"""Whether settings of a product, as a policy has them, can stand in a JSON file and hold no secret. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from cloister.policy.scanner import Path
from cloister.policy.secretscan import looks_secret

_DEPTH = 32


def mistakes_of(value: Any, at: Path, depth: int = 0) -> Iterator[tuple[Path, str]]:
    """Yield the key of each value that cannot be kept, and a sentence that says why."""
    if isinstance(value, dict | list) and depth < _DEPTH:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from mistakes_of(item, (*at, key), depth + 1)
    elif why := _why_not(value):
        yield at, why


def _why_not(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"settings nest at most {_DEPTH} deep"
    if isinstance(value, str):
        return "this looks like a secret itself, and a policy is no place for one" if looks_secret(value) else ""
    if isinstance(value, float) and not math.isfinite(value):
        return "JSON has no such number"
    return "" if isinstance(value, bool | int | float) else f"JSON has no {type(value).__name__}: write it as text"
