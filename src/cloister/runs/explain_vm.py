"""What a guest's file system looks like, in the terms of `explain`: its image, then copies of what is ours. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cloister.isolation.inner import BOX
from cloister.plan.steps import MakeDirectory, Plan
from cloister.plan.workspace import WorkspaceLayout
from cloister.runs.explain import Mounted

_IMAGE = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/etc")
_FRESH = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  # the guest's own


def guest_mounts(plan: Plan, layout: WorkspaceLayout) -> tuple[Mounted, ...]:
    """Return what the guest of a plan has at which place, in order."""
    return tuple(_mounts(plan, layout))


def _mounts(plan: Plan, layout: WorkspaceLayout) -> Iterator[Mounted]:
    vm, home = plan.launch.vm, plan.launch.environment["HOME"]
    assert vm is not None  # noqa: S101  # such a plan has one
    yield Mounted("tmpfs", "/", sealed=True, written="/")
    for place in _IMAGE:
        yield Mounted("image", place, written=place)
    yield Mounted("proc", "/proc", written="/proc")
    yield Mounted("dev", "/dev", written="/dev")
    for place in (*_FRESH, home):
        yield Mounted("tmpfs", place, written=place)
    box = next(step.path for step in plan.steps if isinstance(step, MakeDirectory) and step.path.endswith("/box"))
    yield Mounted("ro", BOX, box, written=BOX)
    for one in vm.carried:
        yield Mounted("rw", f"{home}/{one.name}", one.source, written=f"{home}/{one.name}")
    for name, boxed in vm.homed:
        yield Mounted("rw", f"{home}/{name}", f"{box}/{boxed}", written=f"{home}/{name}")
    for top in (layout.root, "/workspace"):
        yield Mounted("rw", top, layout.root, written=top)
        for mount in layout.mounts:
            below = mount.target[len(layout.root) :]
            if not mount.target.startswith(f"{layout.root}/") or mount.op in {"bind", "pin", "overlay"}:
                continue
            if mount.op == "mask":
                source = "" if mount.node.kind == "directory" else "/dev/null"
                yield Mounted("hidden", f"{top}{below}", source, written=f"{top}{below}")
            else:
                yield Mounted("ro", f"{top}{below}", mount.target, written=f"{top}{below}")
