"""What a unit's plan does to the file system, in the terms of `explain`: its properties first, then root's mounts.

Pure. Where a mount's source is root's alone (the account's state, the box of the run), the plan says what
is there, and what lies deeper nobody but root can know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from cloister.plan.steps import MakeDirectory, Plan
from cloister.plan.unit import AGENTS, UnitLaunch, UnitMount
from cloister.runs.explain import Mounted

_LINKED = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")


def unit_mounts(plan: Plan, home: str) -> tuple[Mounted, ...]:
    """Return what the unit of a plan has mounted, in order.

    Args:
        plan: of a run under systemd.
        home: of the person who starts it, from where things are carried in.
    """
    unit = plan.launch.unit
    assert unit is not None  # noqa: S101  # such a plan has one
    return (*_system(unit), *(_mounted(mount, plan, unit, home) for mount in unit.mounts))


def _system(unit: UnitLaunch) -> Iterator[Mounted]:
    """Yield what the service manager mounts: its root is empty, and root's."""
    yield Mounted("tmpfs", "/", sealed=True, written="/")
    bound = [value for name, value in unit.properties if name == "BindReadOnlyPaths"]
    if "-/bin" not in bound:
        for name in _LINKED:
            yield Mounted("symlink", f"/{name}", f"usr/{name}", written=f"/{name}")
    for value in bound:
        source, _, target = value.removeprefix("-").partition(":")
        yield Mounted("ro", target or source, source, written=target or source)
    yield Mounted("proc", "/proc", written="/proc")
    yield Mounted("dev", "/dev", written="/dev")


def _mounted(mount: UnitMount, plan: Plan, unit: UnitLaunch, home: str) -> Mounted:
    at = mount.target
    match mount.kind:
        case "tmpfs":
            return Mounted("tmpfs", at, sealed=not mount.private, written=at)
        case "mask-file":
            return Mounted("hidden", at, "/dev/null", written=at)
        case "mask-directory":
            return Mounted("hidden", at, written=at)
        case _:
            kind: Literal["ro", "rw"] = (
                "ro" if mount.kind == "ro" else "rw"
            )  # an overlay can be written like its lower layer
            return Mounted(kind, at, _source(mount, plan, unit, home), written=at)


def _source(mount: UnitMount, plan: Plan, unit: UnitLaunch, home: str) -> str:
    """Return where on the host a mount comes from."""
    tops = {
        "workspace": plan.workspace,
        "state": f"{AGENTS}/{unit.account}/{unit.project}",
        "box": next(step.path for step in plan.steps if isinstance(step, MakeDirectory) and step.path.endswith("/box")),
        "carry": home,
    }
    if mount.base in {"copy", "repository"}:
        return mount.target
    if mount.base not in tops:
        return mount.source
    return f"{tops[mount.base]}/{mount.source}" if mount.source else tops[mount.base]
