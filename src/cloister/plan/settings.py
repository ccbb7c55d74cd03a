"""Settings of a product: those of the policy laid over those of the home. Pure.

The result is made anew at every start and shown read-only, so a setting that is taken out of the policy is gone with
the next run, and two runs never write the same file. It is never stored: the home's own settings may hold secrets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def merged(host: bytes | None, managed: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the file to show, and what is wrong with the home's; nothing, where it is fine or not there.

    Args:
        host: the home's file; None where there is none.
        managed: what the policy sets; tables are merged, everything else is replaced.
    """
    base, complaint = _object(host)
    text = json.dumps(_over(base, managed), indent=2, sort_keys=True)
    return text.encode("ascii") + b"\n", complaint


def _object(host: bytes | None) -> tuple[dict[str, Any], str]:
    if host is None:
        return {}, ""
    try:
        found = json.loads(host)
    except (ValueError, RecursionError):
        return {}, "is not JSON"
    return (found, "") if isinstance(found, dict) else ({}, "is JSON, but no object")


def _over(base: Mapping[str, Any], managed: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in managed.items():
        under = result.get(key)
        if isinstance(value, Mapping):
            result[key] = _over(under if isinstance(under, Mapping) else {}, value)
        else:
            result[key] = value
    return result
