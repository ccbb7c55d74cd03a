"""Which user may start which agent: `[users]` of a system policy.

A policy without `[users]` is somebody's own and admits whoever may read it. The user's name
must be the kernel's word (SO_PEERCRED), never an argument: who asks is for the service.
"""

from __future__ import annotations

from cloister.errors import DeniedError
from cloister.policy.model import Policy, User


def admit(policy: Policy, user: str, agent: str) -> User | None:
    """Return the user's table, or None where the policy has no `[users]`; its `roots` limit the workspace.

    Raises:
        DeniedError: `user-not-allowed` or `agent-not-allowed`.
    """
    if not policy.users:
        return None
    found = policy.users.get(user)
    if found is None:
        remedy = f'[users.{user}] agents = ["{agent}"], roots = ["~/src"]'
        raise DeniedError("user-not-allowed", f"user {user!r} is not allowed to use {agent}", remedy=remedy)
    if agent not in found.agents:
        allowed = ", ".join(found.agents)
        message = f"user {user!r} is not allowed to use {agent!r}"
        raise DeniedError("agent-not-allowed", message, where=f".users.{user}.agents", remedy=f"one of {allowed}")
    return found
