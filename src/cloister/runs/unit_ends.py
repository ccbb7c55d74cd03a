"""What hostd and systemd say of a unit in our words: limits that hold, and how it ended.

The end is systemd.service(5), `$SERVICE_RESULT`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from cloister.runs.live import EXIT_TIMEOUT, Outcome

_KILLED = 137
_UNEXPLAINED = ("sandbox-died", "sandbox-failed")


def explain_end(outcome: Outcome, end: Mapping[str, Any]) -> Outcome:
    """Return how a run ended, where only systemd knows: its first process was gone without a word of the agent."""
    if outcome.reason not in _UNEXPLAINED:
        return outcome
    match end.get("Result"):
        case "oom-kill":
            text = "cloister: the run used up its memory_max and was ended [oom-killed]"
            return Outcome(_KILLED, "oom-killed", text)
        case "timeout":
            return Outcome(EXIT_TIMEOUT, "timed-out", "cloister: ended after its runtime_max [timed-out]")
        case str(result) if result and result != "success":
            text = f"{outcome.text}\n  where: systemd says {result}"
            return Outcome(outcome.code, outcome.reason, text)
        case _:
            return outcome


def limits_reached(end: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in words which limit systemd saw reached."""
    return ("memory_max was reached: systemd ended the unit",) if end.get("Result") == "oom-kill" else ()


def without(limits: tuple[str, ...], lacking: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what keeps each limit where the kernel does not keep all of them, and one notice for each that is lost.

    Args:
        limits: what was planned, such as `tasks_max 5: unit (TasksMax=)`.
        lacking: names of properties that are not in force.
    """
    kept, lost = list[str](), list[str]()
    for words in limits:
        what, _, how = words.partition(": ")
        if any(f"({name}=)" in how for name in lacking):
            kept.append(f"{what}: not in force")
            lost.append(f"{what} is not in force: this host's kernel has no such controller for units")
        elif "MemorySwapMax" in lacking and "MemoryMax" not in lacking and "(MemoryMax=)" in how:
            kept.append(words.replace(", no swap", ", and as much swap as there is"))
            lost.append(f"{what} counts no swap, which this host's kernel cannot limit for units")
        else:
            kept.append(words)
    return tuple(kept), tuple(lost)


def told(end: Mapping[str, Any]) -> dict[str, object]:
    """Return what the receipt keeps of it: systemd's result, seconds of CPU, and the most memory that was in use."""
    words: dict[str, object] = {"result": str(end.get("Result", "unknown"))}
    with contextlib.suppress(KeyError, ValueError):
        words["cpu_s"] = round(int(end["CPUUsageNSec"]) / 1e9, 3)
    with contextlib.suppress(KeyError, ValueError):
        words["memory_peak"] = int(end["MemoryPeak"])
    return words
