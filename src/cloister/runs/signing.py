"""Keys of a person's own agents for one run: those of their ssh-agent and of their gpg-agent, put together.

From the policy and this host to two things: `Signing` is part of the plan and of what the agent sees,
`Sources` is where the person's own agents are and what may be asked of them. Serving the sockets
is for `agent_services`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

import msgspec

from cloister.errors import UnsupportedError
from cloister.policy.model import Agent
from cloister.runs.signing_model import Settings, Signing, Situation, Sources


def look_up_keys(agent: Agent, situation: Situation) -> tuple[Signing, Sources]:
    """Return what a run gets of the person's keys; nothing for a policy that names none.

    Raises:
        PolicyError: a key or a host's key cannot be found, or where it stands cannot be trusted.
    """
    named = {name: one for name, one in agent.credentials.items() if one.keys}
    if not named:
        return Signing(), Sources(agent=situation.agent, situation=situation)
    from cloister.runs.signing_gpg import look_gpg
    from cloister.runs.signing_ssh import look_ssh

    ssh, sources = look_ssh(situation, named)
    gpg, gpg_sources = look_gpg(situation, named)
    signing = Signing(
        agents=(*ssh.agents, *gpg.agents),
        files=(*ssh.files, *gpg.files),
        directories=(*ssh.directories, *gpg.directories),
        environment=ssh.environment,
        git=_one_way(ssh.git, gpg.git, situation.git),
        opt_outs=gpg.opt_outs,
        spoken=tuple(dict.fromkeys((*ssh.spoken, *gpg.spoken))),
    )
    return signing, msgspec.structs.replace(
        sources,
        gpg=gpg_sources.gpg,
        gpg_grants=gpg_sources.gpg_grants,
        agent=situation.agent,
        situation=situation,
    )


def _one_way(ssh: Settings, gpg: Settings, person: Mapping[str, str]) -> Settings:
    """Return git's settings: where keys of both kinds may sign, as the person does."""
    by_gpg = gpg and (not ssh or person.get("gpg.format", "openpgp") == "openpgp")
    return gpg if by_gpg else ssh


def refuse_missing(sources: Sources) -> None:
    """Refuse a start whose keys are nowhere: the caller has no ssh-agent.

    Raises:
        UnsupportedError: says what to type.
    """
    if sources.ring is None:
        return
    try:
        good = sources.ssh.startswith("/") and stat.S_ISSOCK(os.stat(sources.ssh).st_mode)
    except (OSError, ValueError):
        good = False
    if not good:
        raise UnsupportedError(
            "ssh-agent-missing",
            "the policy lets the agent use keys of your ssh-agent, and SSH_AUTH_SOCK names none",
            where=f".agents.{sources.ring.agent}.credentials",
            remedy='eval "$(ssh-agent)" && ssh-add, then start the run from the same shell',
        )
