"""Whether settings of a product, as a policy has them, can stand in a JSON file and hold no secret. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cloister.policy.scanner import Path
from cloister.policy.secretscan import looks_secret


def mistakes_of(value: Any, at: Path) -> Iterator[tuple[Path, str]]:
    """Yield the key of each value that cannot be kept, and why; depth and numbers are bounded by `document`."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from mistakes_of(item, (*at, key))
    elif why := _why_not(value):
        yield at, why


def _why_not(value: Any) -> str:
    if isinstance(value, str):
        return "this looks like a secret itself, and a policy is no place for one" if looks_secret(value) else ""
    return "" if isinstance(value, bool | int | float) else f"JSON has no {type(value).__name__}: write it as text"
