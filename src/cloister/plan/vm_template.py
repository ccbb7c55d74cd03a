"""Templates of virtual machines, as data: a guest that has booted and been told nothing yet, to start others from.

A template holds for one `Shape` and no other. Its record names the digests of its two files, the guest's memory and
the state of its devices. Reading and writing them is for `host/vm_template.py`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

from cloister.plan.vm import Accelerator

MEMORY = "memory"
STATE = "state"
RECORD = "record.json"
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that must be equal for a machine to be started from another one's memory."""

    image: str
    version: int
    manifest: Digest
    """Of the image: kernel, initramfs, root and command line."""
    program: str
    """The monitor's path, and who it was when the template was made: its size and its times."""
    accelerator: Accelerator
    host: Digest
    """Of the host's processor and kernel: what a guest has found out about them it believes for ever."""
    memory_mib: int
    cpus: int
    card: bool = False
    """It has a network card, for the bridge."""
    machine: Digest
    """Of the monitor's argv, without what differs between two runs."""

    def key(self) -> str:
        """Return the name of the template's directory."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]

    def describe(self) -> str:
        """Return one line for people."""
        card = ", with a network card" if self.card else ""
        return f"{self.image} {self.version}, {self.memory_mib} MiB, {self.cpus} CPU, {self.accelerator}{card}"


class Template(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of one template."""

    schema: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    shape: Shape
    made: float
    """When, in seconds since the epoch."""
    boot_s: float
    """How long the guest took to say hello, cold."""
    memory: Digest
    """Of the memory: of the pieces that are not empty, each behind its place."""
    memory_bytes: Annotated[int, msgspec.Meta(gt=0)]
    stored_bytes: int
    """What of the memory is not empty."""
    state: Digest
    state_bytes: Annotated[int, msgspec.Meta(gt=0, le=64 << 20)]
    hello: tuple[str, ...]
    """What the guest said of itself when it was up."""

    def digest(self) -> str:
        """Return the SHA-256 of the record: it stands in the plan of each run that starts from it."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()
