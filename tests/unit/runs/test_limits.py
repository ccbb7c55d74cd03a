"""Limits: which mechanism keeps each, and refusal where none does."""

import pytest

from cloister.errors import UnsupportedError
from cloister.policy.model import Limits
from cloister.runs.limits import compile_limits

ALL = Limits(memory_max="1G", tasks_max=10, cpu_quota="150%", runtime_max="1h", open_files=99, disk_max="5M")


def test_a_delegated_cgroup_keeps_memory_tasks_and_cpu() -> None:
    """With a cgroup nothing of these is left to rlimits."""
    limited = compile_limits(ALL, cgroup="/sys/fs/cgroup/x", run="r", is_root=False)

    assert limited.cgroup is not None
    assert (limited.cgroup.memory_bytes, limited.cgroup.tasks, limited.cgroup.cpu_quota_us) == (1 << 30, 10, 150_000)
    assert dict(limited.rlimits) == {"core": 0, "nofile": 99}
    assert (limited.runtime_s, limited.disk_bytes) == (3600, 5 << 20)
    assert limited.notices == ()


def test_rlimits_stand_in_and_say_so() -> None:
    """Without one, memory and tasks fall back to rlimits, and the words say it."""
    limited = compile_limits(Limits(memory_max="1G", tasks_max=10), cgroup="", run="r", is_root=False)

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
        compile_limits(limits, cgroup="", run="r", is_root=is_root)

    assert caught.value.reference == reference


def test_core_dumps_are_always_off() -> None:
    """No policy can switch them on."""
    assert compile_limits(Limits(), cgroup="", run="r", is_root=True).rlimits == (("core", 0),)
