"""What the policy can say and nothing here enforces yet: refused at run time, never ignored.

The model covers all three backends from the start, so that later work adds behaviour and not
syntax. Each entry disappears when the thing it names works.
"""

from __future__ import annotations

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


def refuse_unenforced(agent: Agent) -> None:
    """Refuse an agent's table that asks for more than this version can keep.

    Raises:
        UnsupportedError: names the first key, and what to do.
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
        raise UnsupportedError(
            "isolation-unavailable",
            f"isolation = {agent.isolation!r} is not available in this version",
            where=".isolation",
            remedy='isolation = "namespace"',
        )
    refuse_keys(agent, ("unit", "microvm"))


def refuse_keys(agent: Agent, keys: tuple[str, ...]) -> None:
    """Refuse an agent that has tables of another isolation, by their names.

    Raises:
        UnsupportedError: names the first.
    """
    for key in keys:
        if getattr(agent, key) != _DEFAULTS[key]:
            raise UnsupportedError(
                "policy-not-enforceable",
                f"the table `{key}` is for agents with another isolation than {agent.isolation!r}",
                where=f".{key}",
                remedy=f'isolation = "{key}", or remove `{key}` from the agent\'s table',
            )


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
    refuse_keys(agent, ("microvm",))


def refuse_unenforced_vm(agent: Agent) -> None:
    """Refuse an agent's table that asks for more than a microVM can keep.

    Raises:
        UnsupportedError: names the first key, and what to do.
    """
    refuse_keys(agent, ("unit",))
    if agent.egress.mode == "internet":
        raise UnsupportedError(
            "microvm-internet", "a microVM has no network but the run's proxy, so `internet` cannot be kept",
            where=".egress.mode", remedy='mode = "deny", with what it needs in `allow`',
        )  # fmt: skip
    for key, paths in (("read", agent.filesystem.read), ("write", agent.filesystem.write)):
        if paths:
            raise UnsupportedError(
                "microvm-path", f"no path of this host is shared with a microVM: {paths[0]}",
                where=f".filesystem.{key}", remedy="`carry` copies what lies in the home; or make it part of the image",
            )  # fmt: skip
    _refuse_ports(agent.microvm.ports)
    if (agent.microvm.cpus or 1) > MOST_CPUS:
        raise UnsupportedError(
            "microvm-cpus", f"a guest has at most {MOST_CPUS} processors", where=".microvm.cpus", remedy="cpus = 2"
        )


def _refuse_ports(ports: tuple[int, ...]) -> None:
    if len(set(ports)) < len(ports) or len(ports) > MOST_PORTS:
        raise UnsupportedError(
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
    """Return the keys that would be refused, for `cloister check`."""
    keys = {"unit": ("microvm",), "microvm": ("unit",)}.get(agent.isolation, ("unit", "microvm"))
    return tuple(key for key in keys if getattr(agent, key) != _DEFAULTS[key])
