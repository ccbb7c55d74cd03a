"""Limits: which mechanism keeps each, and refusal where none does."""

import pytest

from cloister.errors import UnsupportedError
from cloister.plan.facts import Cgroup, HostFacts
from cloister.policy.model import Limits
from cloister.runs.limits import Means, compile_limits, means

ALL = Limits(memory_max="1G", tasks_max=10, cpu_quota="150%", runtime_max="1h", open_files=99, disk_max="5M")


FULL = ("cpu", "memory", "pids")


@pytest.mark.parametrize(
    ("means", "word"), [(Means("scope", FULL), "cgroup (systemd scope)"), (Means("cgroup", FULL, "/base"), "cgroup")]
)
def test_a_cgroup_keeps_memory_tasks_and_cpu(means: Means, word: str) -> None:
    """With a cgroup nothing of these is left to rlimits, and the words say which way it is made."""
    limited = compile_limits(ALL, means=means, run="r", is_root=False)

    assert limited.cgroup is not None
    assert limited.cgroup.values() == {"memory.max": str(1 << 30), "pids.max": "10", "cpu.max": "150000 100000"}
    assert dict(limited.rlimits) == {"core": 0, "nofile": 99}
    assert (limited.runtime_s, limited.disk_bytes) == (3600, 5 << 20)
    assert limited.notices == ()
    assert [said.endswith(f": {word}") for said in limited.words if said.startswith(("mem", "tasks", "cpu"))] == [
        True
    ] * 3


def test_the_systemd_manager_comes_first() -> None:
    """On its hosts the tree is systemd's; a directory of our own is the way where there is no manager."""
    host = HostFacts(kernel="6", arch="x86_64", uid=1, cgroup=Cgroup(base="/b", controllers=FULL, manager=FULL))
    alone = HostFacts(kernel="6", arch="x86_64", uid=1, cgroup=Cgroup(base="/b", controllers=FULL))

    assert means(host) == Means("scope", FULL)
    assert means(alone) == Means("cgroup", FULL, "/b")
    assert means(HostFacts(kernel="6", arch="x86_64", uid=1)) == Means()


def test_a_missing_controller_only_matters_to_the_limit_that_needs_it() -> None:
    """Without the cpu controller memory and tasks still have their cgroup; a quota is refused."""
    some = Means("scope", ("memory", "pids"))

    assert compile_limits(Limits(memory_max="1G", tasks_max=9), means=some, run="r", is_root=False).cgroup is not None
    with pytest.raises(UnsupportedError):
        compile_limits(ALL, means=some, run="r", is_root=False)


def test_rlimits_stand_in_and_say_so() -> None:
    """Without one, memory and tasks fall back to rlimits, and the words say it."""
    limited = compile_limits(Limits(memory_max="1G", tasks_max=10), means=Means(), run="r", is_root=False)

    assert dict(limited.rlimits) == {"core": 0, "data": 1 << 30, "nproc": 10}
    assert any("per process" in word for word in limited.words)
    assert limited.notices


@pytest.mark.parametrize(
    ("limits", "is_root", "reference"),
    [
        (Limits(cpu_quota="50%"), False, "cpu-quota-unenforceable"),
        (Limits(memory_max="1G", enforce="cgroup"), False, "cgroup-missing"),
        (Limits(tasks_max=5), True, "tasks-max-unenforceable"),
    ],
)
def test_what_nobody_can_keep_is_refused(limits: Limits, is_root: bool, reference: str) -> None:
    """A promised ceiling is there or the run does not start."""
    with pytest.raises(UnsupportedError) as caught:
        compile_limits(limits, means=Means(), run="r", is_root=is_root)

    assert caught.value.reference == reference


def test_core_dumps_are_always_off() -> None:
    """No policy can switch them on."""
    assert compile_limits(Limits(), means=Means(), run="r", is_root=True).rlimits == (("core", 0),)
