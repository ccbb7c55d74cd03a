"""A snapshot of a virtual machine's disks, as data: what they were, whose, and the digests that they must still have.

It holds the disks and not the memory: the memory of a living agent has its placeholders and tokens in it, which end
with its run. Who starts from a snapshot boots, or starts from a template, and finds the files.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

RECORD = "record.json"
NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a snapshot."""

    name: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    digest: Digest
    """Of what is not empty, each piece behind its place."""


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
