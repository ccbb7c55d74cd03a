"""The kill switch: which agents may not call models, whatever their policy says. Kept across restarts."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

EVERYBODY = "*"
"""Stands for all agents: no agent can have this name."""


def blocked(path: str) -> dict[str, str]:
    """Return the blocked agents, each with the reason.

    A file that is there and cannot be read blocks every agent: a switch that fails must fail towards off.
    """
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return {EVERYBODY: f"{path} cannot be read"}


def reason_for(agents: Mapping[str, str], agent: str) -> str:
    """Return why an agent may not call; empty when it may."""
    return agents.get(EVERYBODY, "") or agents.get(agent, "")


def write(path: str, agents: Mapping[str, str]) -> None:
    """Put other agents in the place of those that were blocked.

    Raises:
        OSError: the state directory cannot be written.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    partial = f"{path}.new"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(agents), indent=2) + b"\n")
        file.flush()
        os.fsync(descriptor)
    os.rename(partial, path)
