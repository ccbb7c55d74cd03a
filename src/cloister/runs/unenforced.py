"""What the policy can say and an agent's isolation cannot keep: refused at run time, never ignored.

Keys of the other isolations are refused too: who wrote them expects something that would not be there.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloister.errors import UnsupportedError
from cloister.policy.document import Document
from cloister.policy.model import Agent, MicroVm, Unit

_DEFAULTS: dict[str, object] = {"unit": Unit(), "microvm": MicroVm()}
MOST_CPUS = 32
"""Of a guest: what Firecracker and QEMU both make."""
MOST_PORTS = 4
"""Of a guest: their listeners travel with the descriptors of one frame (`host/frames.py`, MAX_DESCRIPTORS)."""
_OBEYED_AUDIT = (
    "retention",
    "on_failure",
    "rotate_size",
    "rotate_every",
    "syslog",
    "format",
    "otlp",
    "alarm",
    "ca",
    "certificate",
    "rules",
    "detections",
    "syscalls",
    "fallback",
    "hashes",
)
"""Keys of `[audit]` that have an effect."""


_OTHERS = {"namespace": ("unit", "microvm"), "unit": ("microvm",), "microvm": ("unit",)}
"""Tables of an agent that mean something in another isolation only."""


def refusals(agent: Agent) -> tuple[UnsupportedError, ...]:
    """Return everything for which no broker starts an agent, whatever this host has; empty when one does."""
    return (*_strange_tables(agent), *(_kept_from_guests(agent) if agent.isolation == "microvm" else ()))


def refuse_unenforced(agent: Agent) -> None:
    """Refuse what a sandbox of namespaces cannot keep.

    Raises:
        UnsupportedError: names the first key, and what to do.
        ValueError: the agent is for a microVM: it must never get less than it asks for.
    """
    if agent.isolation == "unit":
        # A user's own broker has no system user to give: it must never stand in with less than what was asked for.
        raise UnsupportedError(
            "unit-needs-system-policy",
            'isolation = "unit" is for agents of the system\'s policy, which root sets up',
            where=".isolation",
            remedy='sudo cloister setup, or isolation = "namespace"',
        )
    if agent.isolation != "namespace":
        raise ValueError(f"no sandbox of namespaces for isolation = {agent.isolation!r}")
    _refuse(agent)


def refuse_unenforced_unit(agent: Agent) -> None:
    """Refuse an agent of the system's policy that is no unit, or asks for more than one can keep.

    Raises:
        UnsupportedError: names the first key, and what to do.
    """
    if agent.isolation != "unit":
        raise UnsupportedError(
            "isolation-not-unit",
            f"isolation = {agent.isolation!r} is not what the system's broker starts",
            where=".isolation",
            remedy="cloister run, as yourself",
        )
    _refuse(agent)


def refuse_unenforced_vm(agent: Agent) -> None:
    """Refuse an agent's table that asks for more than a microVM can keep.

    Raises:
        UnsupportedError: names the first key, and what to do.
    """
    _refuse(agent)


def _refuse(agent: Agent) -> None:
    for error in refusals(agent):
        raise error


def _strange_tables(agent: Agent) -> Iterator[UnsupportedError]:
    for key in unenforced_keys(agent):
        yield UnsupportedError(
            "policy-not-enforceable",
            f"nothing enforces `{key}` with isolation = {agent.isolation!r}, so the agent is not started",
            where=f".{key}",
            remedy=f'isolation = "{key}", or remove `{key}` from the agent\'s table',
        )


def _kept_from_guests(agent: Agent) -> Iterator[UnsupportedError]:
    if agent.egress.mode == "internet":
        yield UnsupportedError(
            "microvm-internet", "a microVM has no network but the run's proxy, so `internet` cannot be kept",
            where=".egress.mode", remedy='mode = "deny", with what it needs in `allow`',
        )  # fmt: skip
    for key, paths in (("read", agent.filesystem.read), ("write", agent.filesystem.write)):
        if paths:
            yield UnsupportedError(
                "microvm-path", f"no path of this host is shared with a microVM: {paths[0]}",
                where=f".filesystem.{key}", remedy="`carry` copies what lies in the home; or make it part of the image",
            )  # fmt: skip
    if (agent.microvm.cpus or 1) > MOST_CPUS:
        yield UnsupportedError(
            "microvm-cpus", f"a guest has at most {MOST_CPUS} processors", where=".microvm.cpus", remedy="cpus = 2"
        )
    ports = agent.microvm.ports
    if len(set(ports)) < len(ports) or len(ports) > MOST_PORTS:
        yield UnsupportedError(
            "microvm-ports", f"a guest has at most {MOST_PORTS} reachable ports, each named once",
            where=".microvm.ports", remedy=f"ports = [{', '.join(map(str, sorted(set(ports))[:MOST_PORTS]))}]",
        )  # fmt: skip


def refuse_tables(document: Document) -> None:
    """Refuse a policy that holds tables of the whole policy which nothing obeys yet.

    Raises:
        UnsupportedError: names the first one and where it stands.
    """
    written: set[tuple[str, ...]] = {
        ("audit", key) for key in document.tables.get("audit", {}) if key not in _OBEYED_AUDIT
    }
    for path in sorted(written):
        shown = ".".join(path)
        raise UnsupportedError(
            "policy-not-enforceable",
            f"nothing in this version obeys `{shown}`, so no agent was started",
            where=document.where(path),
            remedy=f"remove `{shown}`",
        )


def unenforced_keys(agent: Agent) -> tuple[str, ...]:
    """Return the tables that are written for an agent and mean nothing in its isolation."""
    return tuple(key for key in _OTHERS[agent.isolation] if getattr(agent, key) != _DEFAULTS[key])
