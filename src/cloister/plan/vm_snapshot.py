"""A snapshot of a virtual machine, as data: its disks, its memory where that was kept, and their digests.

Who begins with the disks boots, or starts from a template, and finds the files. Who goes on from the memory finds its
processes where they stood: what cannot be changed in there must be what it would be now (`Memory.inside`).
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

from cloister.plan.vm_template import Shape

RECORD = "record.json"
MEMORY = "memory"
"""Name of the file with the state of the whole machine: memory, processors, devices. Of Firecracker: the memory."""
STATE = "state"
"""Of Firecracker: processors and devices."""
NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a snapshot."""

    name: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    digest: Digest
    """Of what is not empty, each piece behind its place."""


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be equal, and what must be known, for processes to go on from a memory. No secret is in it."""

    shape: Shape
    """Of the machine that goes on."""
    named: bool
    """Its memory has a name of its own, as that of a machine from a template."""
    commands: Annotated[int, msgspec.Meta(ge=0)]
    """The highest number of a command that was started in it."""
    pty: bool
    """Its agent has a terminal."""
    findings: tuple[str, ...]
    """What the self-probe of its walls found before the agent started."""
    inside: dict[str, Digest]
    """Digests of what nobody can change in there any more, by what it is."""
    placeholders: dict[str, tuple[str, ...]]
    """What its processes hold in place of secrets, by credential: tokens and key ids, also of runs before that one."""
    model: str = ""
    """The one model that its caller had narrowed it to."""
    directory: str = ""
    """Where its agent was started."""
    extra_names: tuple[str, ...] = ()
    """Variables that its caller had carried in by name."""
    model_keys: tuple[str, ...] = ()
    """What they present to the run's own way to models: that run's, and those of runs before it."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of one snapshot."""

    schema: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    run: str
    """The run that it was taken of."""
    agent: str
    profile: str
    workspace: str
    asked: tuple[str, ...]
    """What that run was asked to do."""
    image: str
    version: int
    manifest: Digest
    made: float
    paused_s: float
    """How long the machine stood still for it."""
    fields: tuple[str, ...]
    """What a guest is told of this workspace (`ro=`, `mask=`)."""
    disks: tuple[Disk, ...]
    """Its files: those of the disks, and MEMORY and STATE."""
    memory: Memory | None = None

    def digest(self) -> str:
        """Return the SHA-256 of the record: it stands in the plan of each run that goes on from its memory."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()
