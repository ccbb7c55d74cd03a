"""What the audit can see on this kernel: from the programs that are attached to words for heads, `log.tier` and people.

Each *area* is seen by one tier. What a tier cannot see is said with it, so that nobody finds out by an attack
that was not recorded. Nothing here loads anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

AREAS = ("process", "network", "files", "calls", "rings")
_BLIND = {
    ("process", "none"): "launched, forked and ended processes",
    ("network", "none"): "connections made around the proxy",
    ("files", "none"): "files",
    ("files", "tracepoint"): "files opened by io_uring, and paths of failed calls as the kernel saw them",
    ("calls", "none"): "system calls, their counts, privileges, namespaces, ptrace and modules",
    ("calls", "tracepoint"): "arguments that another thread changed and changed back during the call",
    ("rings", "none"): "operations of io_uring",
}
_PROGRAMS = {
    "process": (frozenset({"process_exec", "process_fork", "process_exit"}), "tracepoint"),
    "network": (frozenset({"network_connect4", "network_connect6", "network_sendmsg4", "network_sendmsg6",
                           "network_bind4", "network_bind6"}), "cgroup"),
    "calls": (frozenset({"calls_enter", "calls_exit"}), "tracepoint"),
}  # fmt: skip


def tiers(attached: Iterable[str]) -> dict[str, str]:
    """Return the tier of each area; one whose programs are not all there says `partial`, or `none`."""
    have = set(attached)
    found: dict[str, str] = {}
    for area, (wanted, tier) in _PROGRAMS.items():
        found[area] = tier if wanted <= have else "partial" if wanted & have else "none"
    if any(name.startswith("lsm_") for name in have):
        found["files"] = "lsm"
    elif any(name.startswith("fentry_") for name in have):
        found["files"] = "fentry"
    else:
        found["files"] = found["calls"]
    rings = any(name.startswith("rings_") for name in have)
    found["rings"] = found["files"] if found["files"] in {"lsm", "fentry"} else "tracepoint" if rings else "none"
    return {area: found[area] for area in AREAS}


def blind(found: Mapping[str, str]) -> tuple[str, ...]:
    """Return what these tiers do not see, in words."""
    seen = [_BLIND.get((area, found.get(area, "none")), "") for area in AREAS]
    partial = [f"some of: {_BLIND[area, 'none']}" for area in AREAS if found.get(area) == "partial"]
    return tuple(words for words in (*seen, *partial) if words)
