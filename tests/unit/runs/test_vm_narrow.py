"""What the caller of one machine may narrow, and that nothing of it can be widened. Shapes of templates."""

from __future__ import annotations

import msgspec
import pytest

from cloister.errors import DeniedError, UsageError
from cloister.llm.access import Access
from cloister.plan.vm import VmFile
from cloister.plan.vm_template import Shape
from cloister.policy.model import Agent, Llm, MicroVm
from cloister.runs import vm_warm
from cloister.runs.request import RunRequest
from cloister.runs.vm_narrow import narrowed, only_model
from cloister.runs.vm_shape import COLD, asked_shape_of, shape_of, warm_machine

LLM = Llm(providers=("anthropic",), models=("claude-*",), aliases={"fast": "claude-haiku"})
AGENT = Agent(isolation="microvm", microvm=MicroVm(memory="1G", cpus=2), llm=LLM)


def asked(**fields: str) -> RunRequest:
    """Return a request of `cloister vm start`."""
    return RunRequest(agent="claude", machine="1", **fields)


def test_less_memory_and_fewer_processors_are_given() -> None:
    """A start may have less than the policy says."""
    agent = narrowed(AGENT, asked(memory="512M", cpus="1"))
    assert (agent.microvm.memory, agent.microvm.cpus) == ("512M", 1)


@pytest.mark.parametrize(
    ("fields", "reference"),
    [({"memory": "2G"}, "memory-denied"), ({"cpus": "3"}, "cpus-denied"), ({"model": "gpt-5"}, "model-denied")],
)
def test_more_than_the_policy_says_is_denied(fields: dict[str, str], reference: str) -> None:
    """More memory, more processors, a model that is not allowed: each is refused."""
    with pytest.raises(DeniedError) as caught:
        narrowed(AGENT, asked(**fields))
    assert caught.value.reference == reference


@pytest.mark.parametrize("fields", [{"memory": "much"}, {"cpus": "0"}, {"cpus": "-1"}, {"cpus": "x"}])
def test_what_is_no_size_is_a_mistake(fields: dict[str, str]) -> None:
    """A value that cannot be read is told."""
    with pytest.raises(UsageError):
        narrowed(AGENT, asked(**fields))


def test_only_agents_with_a_machine_are_meant() -> None:
    """`cloister vm` refuses an agent whose policy has another isolation: it would be weaker without a word."""
    with pytest.raises(UsageError) as caught:
        narrowed(Agent(), asked())
    assert caught.value.reference == "vm-not"


def test_one_model_is_left() -> None:
    """Of all models that the policy allows, the one that was asked for is left, by its alias too."""
    access = Access(narrowed(AGENT, asked(model="claude-opus")).llm)
    assert access.resolve("claude-opus") == "claude-opus"
    assert access.resolve("claude-haiku") is None
    access = Access(narrowed(AGENT, asked(model="fast")).llm)
    assert access.resolve("fast") == "claude-haiku"
    assert access.resolve("claude-opus") is None


def test_a_model_that_a_reload_takes_back_is_gone() -> None:
    """After a reload whose policy allows the one model no more, the run has none: no list of all."""
    access = Access(only_model(Llm(providers=("a",), models=("gpt-*",)), "claude-opus"))
    assert access.resolve("claude-opus") is None
    assert access.resolve("gpt-5") is None


def test_what_makes_a_template_is_equal_to_what_starts_from_it() -> None:
    """The machine that becomes a template and the one that starts from it have one shape; another one has another."""
    one = warm_machine("/usr/bin/qemu", "tcg", "quiet", memory_mib=256, cpus=1)
    maker = warm_machine("/usr/bin/qemu", "tcg", "quiet", memory_mib=256, cpus=1, making=True)
    image = ("test", 1, "0" * 64)
    shape = shape_of(image, one, program="p", host="h")
    assert shape == shape_of(image, maker, program="p", host="h")
    assert shape == shape_of(image, msgspec.structs.replace(one, qmp="/x"), program="p", host="h")
    card = msgspec.structs.replace(one, mac="52:54:00:00:00:00")
    carded = shape_of(image, card, program="p", host="h")
    assert (carded.card, shape.card, carded.key() != shape.key()) == (True, False, True)
    for change in ({"mac": "52:54:11:22:33:44"}, {"tap_fd": 13}, {"disk_rate": 1 << 20}):
        assert shape_of(image, msgspec.structs.replace(card, **change), program="p", host="h") == carded, change
    for change in ({"cmdline": "loud"}, {"memory_mib": 512}, {"cpus": 2}, {"accelerator": "kvm"}, {"program": "/q"}):
        other = shape_of(image, msgspec.structs.replace(one, **change), program="p", host="h")
        assert other.key() != shape.key(), change
    assert shape_of(image, one, program="p2", host="h").key() != shape.key()
    assert shape_of(image, one, program="p", host="h2").key() != shape.key()
    assert shape_of(("test", 1, "1" * 64), one, program="p", host="h").key() != shape.key()


def test_machines_of_firecracker_have_shapes_of_their_own() -> None:
    """All that it is asked for decides the shape; who may start from a template is no part of one."""

    def shape(**changes: object) -> Shape:
        found = vm_warm.Wanted("test", 1, "0" * 64, "firecracker", "/fc", "kvm", "quiet", 256, 1)._replace(**changes)
        return asked_shape_of(found.launch(), program="p", host="h")

    assert shape() == shape()
    for change in ({"cmdline": "loud"}, {"memory_mib": 512}, {"cpus": 2}, {"manifest": "1" * 64}):
        assert shape(**change).key() != shape().key(), change
    # As a run has it: with a bound for its disks, and in a place of its own.
    run = vm_warm.Wanted("test", 1, "0" * 64, "firecracker", "/fc", "kvm", "quiet", 256, 1).launch()
    run = msgspec.structs.replace(run, disk_rate=1 << 20, directory="/run/x", fields=("a=b",))
    assert asked_shape_of(run, program="p", host="h") == shape()
    # And one that boots, or goes on from a memory: what it starts from, and is kept into, makes no other machine.
    out = tuple(VmFile(role=role, path="", write=True) for role in ("memory-out", "state-out"))
    for files in ((*run.files[:COLD], *out), (*run.files, *out)):
        other = msgspec.structs.replace(run, files=files)
        assert asked_shape_of(other, program="p", host="h") == shape()
