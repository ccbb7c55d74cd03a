"""The look at the environment before an interactive start: what is carried in, grouped and masked."""

from __future__ import annotations

from collections.abc import Mapping

from cloister.policy.secretscan import audit_environment


def describe(environment: Mapping[str, str], model_keys: tuple[str, ...] = ()) -> str:
    """Return the text shown to the person, ending in the question."""
    lines = ["cloister: the agent will see these variables of yours:"]
    for group in audit_environment(environment, model_keys=model_keys):
        lines.append(f"  {group.title}")
        lines += [f"    {variable.name} = {variable.shown}" for variable in group.variables]
    return "\n".join(lines) + "\nStart? [Y/n] "
