"""What the caller of one run may narrow: one model, less memory, fewer processors. Never more than the policy says."""

from __future__ import annotations

import msgspec

from cloister.errors import DeniedError, UsageError
from cloister.llm.access import Access
from cloister.policy.model import Agent, Llm
from cloister.policy.units import parse_size
from cloister.runs.compile_vm import memory_of
from cloister.runs.request import RunRequest

_MIB = 1 << 20
_NOTHING = ("",)
"""A list of models that allows none: no model has an empty name."""


def narrowed(agent: Agent, request: RunRequest) -> Agent:
    """Return the agent as this run may be.

    Raises:
        UsageError: it does not run in a microVM, or a value cannot be read.
        DeniedError: more was asked for than the policy allows.
    """
    if agent.isolation != "microvm":
        raise UsageError(
            "vm-not", f"the agent {request.agent!r} does not run in a microVM",
            where=f".agents.{request.agent}.isolation", remedy='isolation = "microvm"',
        )  # fmt: skip
    machine = agent.microvm
    if request.memory:
        machine = msgspec.structs.replace(machine, memory=_memory(agent, request.memory))
    if request.cpus:
        machine = msgspec.structs.replace(machine, cpus=_cpus(machine.cpus or 1, request.cpus))
    llm = agent.llm
    if request.model:
        if not llm.providers:
            raise UsageError("model-none", "the agent's policy names no provider of models", where=".llm.providers")
        if Access(llm).resolve(request.model) is None:
            raise DeniedError(
                "model-denied", f"the policy does not allow the model {request.model!r}",
                where=".llm.models", remedy=f"allowed: {Access(llm).describe()}",
            )  # fmt: skip
        llm = only_model(llm, request.model)
    return msgspec.structs.replace(agent, microvm=machine, llm=llm)


def only_model(llm: Llm, model: str) -> Llm:
    """Return a policy for models that allows one of those it allowed; none, where it does not allow that one."""
    meant = Access(llm).resolve(model)
    if meant is None:
        return msgspec.structs.replace(llm, models=_NOTHING, aliases={})
    aliases = {model: llm.aliases[model]} if model in llm.aliases else {}
    return msgspec.structs.replace(llm, models=(meant,), aliases=aliases)


def _memory(agent: Agent, text: str) -> str:
    most = memory_of(agent)
    try:
        wanted = parse_size(text)
    except ValueError as error:
        raise UsageError("memory-invalid", f"--mem: {error}", remedy="--mem 512") from None
    if wanted > most:
        raise DeniedError(
            "memory-denied", f"the policy allows {most // _MIB} MiB of memory", where=".microvm.memory",
            remedy=f"--mem {most // _MIB}",
        )  # fmt: skip
    return text


def _cpus(most: int, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise UsageError("cpus-invalid", f"--cpus: {text!r} is no number of processors", remedy="--cpus 1")
    if int(text) > most:
        raise DeniedError(
            "cpus-denied", f"the policy allows {most} processor{'s' if most > 1 else ''}", where=".microvm.cpus",
            remedy=f"--cpus {most}",
        )  # fmt: skip
    return int(text)
