"""What is known about the keys of a run: facts that come in, what the plan gets, what the broker keeps. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from cloister.errors import PolicyError, Problem

if TYPE_CHECKING:
    from cloister.credentials.gpg_agent import GpgGrant
    from cloister.credentials.ssh_agent import Ring
    from cloister.host.gpg_keys import GpgKeys

Settings = tuple[tuple[str, str], ...]
"""git's configuration, as keys and values."""


class BoxFile(msgspec.Struct, frozen=True):
    """A file made for the run: its name in the box directory, and below the home where it is shown there too."""

    name: str
    text: str = ""
    home: str = ""
    data: bytes = b""
    """In place of the text."""


class ServedAgent(msgspec.Struct, frozen=True):
    """A socket of the run on which one of the person's agents is served, filtered."""

    kind: Literal["ssh", "gpg"]
    socket: str
    words: tuple[str, ...]


class Signing(msgspec.Struct, frozen=True):
    """What the plan has of it."""

    agents: tuple[ServedAgent, ...] = ()
    files: tuple[BoxFile, ...] = ()
    directories: tuple[str, ...] = ()
    """Directories below the home that only the agent may look into: OpenSSH and GnuPG ask for that."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    git: tuple[tuple[str, str], ...] = ()
    opt_outs: tuple[str, ...] = ()
    spoken: tuple[str, ...] = ()
    """What the agent's model is told."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of one start."""

    agent: str
    uid: int
    home: str
    writable: tuple[str, ...]
    """Directories that agents write: nothing in them says which key is meant."""
    environment: Mapping[str, str]
    """The caller's, as far as it says where agents are."""
    git: Mapping[str, str]
    """How the person signs commits."""
    gpg_keys: GpgKeys


class Sources(msgspec.Struct, frozen=True):
    """What the broker has of it: where the person's agent is, by the caller's environment, and what it is asked."""

    ring: Ring | None = None
    ssh: str = ""
    gpg_grants: tuple[GpgGrant, ...] = ()
    gpg: str = ""
    agent: str = ""
    situation: Situation | None = None
    """The facts of the start, by which a changed policy is looked up again."""


def wrong(reference: str, message: str, where: str, remedy: str) -> PolicyError:
    """Return the error of a key that cannot be had."""
    return PolicyError([Problem(message, where, remedy)], reference=reference)
