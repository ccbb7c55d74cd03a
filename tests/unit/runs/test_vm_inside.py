"""What a kept guest has inside must be what the policy would make of it now: each part has a digest, and a name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cloister.plan.steps import Launch, Plan, WriteBytes
from cloister.plan.vm import VmCarried, VmLaunch
from cloister.policy.model import Agent, Filesystem, Workspace
from cloister.runs.vm_inside import inside
from cloister.runs.vm_keeping import memoryless

AGENT = Agent(preset="shell")
VM = VmLaunch(
    image="test", version=1, manifest="0" * 64, monitor="qemu", accelerator="tcg", memory_mib=256, cpus=1, files=(),
    fields=("hostname=a", "machine_id=b", "uid=1000", "tmpfs=5"), inner=("shim", "inner"), directory="/run/vm",
    disk_bytes=1,
)  # fmt: skip


def plan(run: str = "r1", data: bytes = b"filter", **changes: Any) -> Plan:
    """Return a plan of which only what is looked at is there."""
    own = VM.__struct_fields__
    vm = msgspec.structs.replace(VM, **{name: value for name, value in changes.items() if name in own})
    rest = {name: value for name, value in changes.items() if name not in own}
    rest = {"environment": {}, **rest}
    launch = Launch(argv=("x",), command=("sh",), directory="/p", vm=vm, **rest)
    return Plan(
        run=run, agent="a", preset="shell", isolation="microvm", workspace="/p", policy_digest="",
        steps=(WriteBytes(path="/box/seccomp.bpf", data=data), launch),
    )  # fmt: skip


def test_what_a_guest_takes_anew_may_differ() -> None:
    """Its names, its run, its memory's template and its disk are not inside."""
    one = inside(plan(environment={"A": "b", "CLOISTER_RUN": "r1"}), AGENT)
    fields = ("hostname=c", "machine_id=d", "uid=1000", "tmpfs=5")
    other = plan(run="r2", fields=fields, template="x", environment={"A": "b", "CLOISTER_RUN": "r2"})
    assert inside(other, AGENT) == one


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"fields": ("uid=1001", "tmpfs=5")}, "account"), ({"inner": ("shim", "inner", "--landlock")}, "walls"),
     ({"data": b"other"}, "filter"), ({"seccomp": "nested"}, "filter"), ({"environment": {"A": "c"}}, "environment"),
     ({"inherit": ("EDITOR",)}, "environment"), ({"carried": (VmCarried("x", "/h/x", "file"),)}, "carried"),
     ({"seeds": (("x", "y"),)}, "carried"), ({"homed": (("x", "y"),)}, "carried")],
)  # fmt: skip
def test_what_cannot_be_changed_inside_has_a_name(changes: dict[str, Any], what: str) -> None:
    """One part differs, and that one alone."""
    one, other = inside(plan(), AGENT), inside(plan(**changes), AGENT)
    (found,) = (name for name in one if one[name] != other[name])
    assert what in found


@pytest.mark.parametrize(
    "agent",
    [Agent(preset="shell", filesystem=Filesystem(hide=("~/x",))),
     Agent(preset="shell", workspace=Workspace(protect=("x",))),
     Agent(preset="shell", settings={"a": "b"})],
)  # fmt: skip
def test_the_policy_for_files_counts(agent: Agent) -> None:
    """What the policy hides or protects now was laid out then."""
    assert inside(plan(), agent) != inside(plan(), AGENT)


@pytest.mark.parametrize(
    ("vm", "agent", "why"),
    [(VM, "2", ""), (VM, "17", ""), (VM, "1", "image renew"), (VM, None, "image renew"), (VM, "x", "image renew"),
     (msgspec.structs.replace(VM, network="bridge"), "2", "image renew"),
     (msgspec.structs.replace(VM, network="bridge"), "3", ""),
     (msgspec.structs.replace(VM, monitor="firecracker"), "3", "image renew"),
     (msgspec.structs.replace(VM, monitor="firecracker"), "4", "")],
)  # fmt: skip
def test_whose_memory_cannot_be_kept(vm: VmLaunch, agent: object, why: str) -> None:
    """Machines with an older helper keep their disks, and it is said why; a card wants more, Firecracker most."""
    assert (why in memoryless(vm, agent)) if why else memoryless(vm, agent) == ""
