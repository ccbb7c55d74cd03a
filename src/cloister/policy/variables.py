"""Which variables an agent's credentials set, and which names two parts of a policy would both set.

A variable that holds a placeholder and is carried in from the caller as well would be a coin
toss between a placeholder and a real secret, so such a policy is refused. Judges names only.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloister.policy.model import Agent, Credential
from cloister.policy.scanner import Path

KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Where AWS tools look for a pair (AWS SDKs and Tools reference guide, "Static credentials")."""


def variables(credential: Credential) -> tuple[str, ...]:
    """Return the names of the variables in which the agent finds the placeholder."""
    if credential.inject is not None and credential.inject.scheme == "sigv4":
        return KEY_VARIABLES
    return (credential.env,) if credential.env else ()


def collisions(agent: Agent) -> Iterator[tuple[Path, str]]:
    """Yield the key of each credential whose variable is set elsewhere too, and a sentence that says where."""
    taken: dict[str, str] = dict.fromkeys(agent.environment, "environment")
    taken |= dict.fromkeys(agent.pass_environment, "pass_environment")
    for name, credential in agent.credentials.items():
        for variable in variables(credential):
            if variable in taken:
                yield ("credentials", name, "env"), f"the variable {variable} is set by {taken[variable]} as well"
            taken[variable] = f"credentials.{name}"
