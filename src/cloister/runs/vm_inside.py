"""What nobody can change in a guest that lives: its account, its walls, what was carried in. Pure.

A run that goes on from a snapshot's memory obeys the policy of now. Outside of the guest that is enforced anew with
every request; what is inside must be what the policy would make of it now, or the snapshot is refused.
"""

from __future__ import annotations

import hashlib
import os

import msgspec

from cloister.plan.steps import Plan, WriteBytes
from cloister.policy.model import Agent
from cloister.runs.compile_vm import FILTER

_RENEWED = ("hostname=", "machine_id=")
"""Fields that a guest takes anew."""


def inside(plan: Plan, agent: Agent) -> dict[str, str]:
    """Return a digest for each part, by words for people."""
    launch, vm = plan.launch, plan.launch.vm
    assert vm is not None  # noqa: S101  # only such runs come here
    named = {name: value for name, value in launch.environment.items() if plan.run not in value}
    steps = [step for step in plan.steps if isinstance(step, WriteBytes)]
    filters = [hashlib.sha256(step.data).hexdigest() for step in steps if os.path.basename(step.path) == FILTER]
    parts: dict[str, object] = {
        "account, places or limits": [word for word in vm.fields if not word.startswith(_RENEWED)],
        "walls": vm.inner,
        "filter of system calls": [launch.seccomp, filters],
        "environment": [sorted(named.items()), sorted(launch.inherit)],
        "carried files": [vm.carried, vm.homed, vm.seeds],
        "policy for files": agent.filesystem,
        "policy for the workspace": agent.workspace,
        "settings": agent.settings,
    }
    return {what: hashlib.sha256(msgspec.json.encode(part, order="sorted")).hexdigest() for what, part in parts.items()}
