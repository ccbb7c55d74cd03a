"""Where an agent's secrets lie, held against what its sandbox shows and may write. Reads no secret.

A secret that the agent can read itself makes a placeholder a decoration, so such a run does not start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from cloister.errors import PolicyError, Problem
from cloister.plan.steps import Plan
from cloister.plan.unit import AGENTS
from cloister.runs.explain import Explainer, Look, parse_mounts

_FILE = "file:"


def refuse_visible(plan: Plan, home: str, look: Look) -> None:
    """Refuse a plan whose sandbox would show one of its own secrets.

    Raises:
        PolicyError: `secret-visible`, with the credential and the place.
    """
    files = [one for one in plan.credentials if one.secret.startswith(_FILE)]
    if not files:
        return
    explainer = Explainer(plan, look)
    for credential in files:
        for path in _appearances(plan, host_path(credential.secret, home)):
            if explainer.ask(path).readable:
                where = f".agents.{plan.agent}.credentials.{credential.name}.secret"
                message = f"the agent could read the secret itself, at {path}"
                remedy = "move the file, such as to ~/.config/cloister, or add it to filesystem.hide"
                raise PolicyError([Problem(message, where, remedy)], reference="secret-visible")


def writable_places(plan: Plan, state: str) -> tuple[str, ...]:
    """Return the host's directories that the agent can write: nothing secret, and no program, is taken from there."""
    # A unit's argv is our shim's: of the host's places it can write its workspace, its repository and its own state.
    unit = plan.launch.unit
    mounts = () if unit else parse_mounts(plan.launch.argv)
    bound = [mount.source for mount in mounts if mount.kind == "rw" and mount.source]
    bound += [hold.source or hold.target for hold in plan.launch.holds if hold.mode == "rw"]
    bound += [AGENTS, *(mount.target for mount in unit.mounts if mount.base == "repository")] if unit else []
    return tuple(dict.fromkeys(os.path.realpath(place) for place in (*bound, plan.workspace, state)))


def host_path(reference: str, home: str) -> str:
    """Return the path that a `file:` reference means."""
    path = reference.removeprefix(_FILE)
    return home + path[1:] if path.startswith("~/") else path


def _appearances(plan: Plan, path: str) -> Iterator[str]:
    """Yield the places in the sandbox at which a file of the host could appear, by whatever mount."""
    real = os.path.realpath(path)
    yield from dict.fromkeys((path, real))
    for mount in parse_mounts(plan.launch.argv):
        if mount.kind in {"ro", "rw"} and mount.source:
            source = os.path.realpath(mount.source)
            if real == source or real.startswith(source.rstrip("/") + "/"):
                yield mount.target + real[len(source) :]
