"""Credentials as a plan shows them: reference, places, form and variables, never a value. Pure.

Every plan is made by way of this, so what only agents with credentials need is imported for them alone.
"""

from __future__ import annotations

from cloister.errors import PolicyError, Problem
from cloister.plan.steps import PlannedCredential
from cloister.policy.model import Agent, Credential
from cloister.policy.variables import collisions, variables


def planned(agent: Agent) -> tuple[PlannedCredential, ...]:
    """Return the secrets of an agent as its plan shows them.

    Raises:
        PolicyError: two parts of the policy set the same variable.
    """
    if clashes := list(collisions(agent)):
        problems = [Problem(why, "." + ".".join(map(str, path)), "give it to one of them") for path, why in clashes]
        raise PolicyError(problems)
    return tuple(_planned(name, one) for name, one in agent.credentials.items() if one.secret)


def _planned(name: str, credential: Credential) -> PlannedCredential:
    from cloister.credentials.bindings import hosts_of, words

    inject = credential.inject
    return PlannedCredential(
        name=name,
        secret=credential.secret,
        hosts=tuple(f"{host}:{inject.port}" for host in hosts_of(inject)) if inject else (),
        how=words(inject) if inject else "nothing",
        variables=variables(credential),
        methods=inject.methods if inject else (),
        paths=inject.paths if inject else (),
        mask=credential.mask,
    )


def spoken(planned_ones: tuple[PlannedCredential, ...]) -> tuple[str, ...]:
    """Return what the agent's model is told: `VARIABLE for HOST`."""
    return tuple(f"{' and '.join(one.variables)} for {', '.join(one.hosts)}" for one in planned_ones if one.variables)


def credentials_for(agent: Agent, host: str, port: int) -> tuple[str, ...]:
    """Return the names of the credentials bound to a place."""
    from cloister.credentials.bindings import hosts_of

    injected = [(name, one.inject) for name, one in agent.credentials.items() if one.inject is not None]
    return tuple(name for name, inject in injected if inject.port == port and host in hosts_of(inject))
