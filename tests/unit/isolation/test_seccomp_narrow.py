"""The allowlists of programs that only work on files: what is in them, and that a slip is an error."""

from __future__ import annotations

from importlib import resources

import pytest

from cloister.errors import UnsupportedError
from cloister.isolation.seccomp_narrow import allowed, assemble_narrow, lists, parse
from cloister.isolation.seccomp_table import table

TEXT = resources.files("cloister.isolation").joinpath("seccomp_narrow.toml").read_text(encoding="utf-8")
ARCHES = ["aarch64", "riscv64", "x86_64"]


@pytest.mark.parametrize("arch", ARCHES)
def test_fits_the_kernel_on_every_architecture(arch):
    """Each profile is whole instructions, and the two are not the same."""
    programs = [assemble_narrow(arch, name) for name in ("disk-tool", "disk-reader")]
    assert all(len(program) % 8 == 0 and len(program) // 8 < 500 for program in programs)
    assert len(set(programs)) == 2


def test_unknown_architecture_is_refused():
    """No filter is ever made up."""
    with pytest.raises(UnsupportedError) as caught:
        assemble_narrow("s390x", "disk-tool")
    assert caught.value.reference == "seccomp-arch"


@pytest.mark.parametrize("name", ["disk-tool", "disk-reader"])
def test_nothing_that_agents_are_refused_is_allowed(name):
    """What the denylist of agents refuses always is in no allowlist, nor are sockets, signals and devices."""
    refused = {rule.syscall for group in table().groups for rule in group.rules if not rule.when}
    calls = allowed(lists(), name)
    assert not refused & calls.keys()
    assert not {"socket", "socketpair", "ioctl", "kill", "tgkill", "fork", "vfork", "execveat"} & calls.keys()


def test_the_reader_executes_nothing():
    """It has no execve and no process or thread, and no memory of it becomes code."""
    calls = allowed(lists(), "disk-reader")
    assert not {"execve", "clone", "clone3"} & calls.keys()
    for name in ("mmap", "mprotect"):
        (condition,) = calls[name]
        assert (condition.arg, condition.mask, condition.values, condition.negated) == (2, 4, (0,), False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"read", "write"', '"raed", "write"', "raed"),
        ("[numbers]", "[numbers]\nptrace = [101, 117]", "ptrace"),
        ('mask = ["CLONE_THREAD"]', 'mask = ["CLONE_THRAED"]', "CLONE_THRAED"),
        ('syscalls = ["execve"', 'syscalls = ["read", "execve"', "named twice"),
        ('name = "disk-tool"', 'name = "disk-toll"', "disk-toll"),
        ('syscall = "prctl"', 'sycall = "prctl"', "sycall"),
    ],
)
def test_a_slip_in_the_lists_is_an_error(old, new, message):
    """A misspelt call or constant stops the lists from loading; it never becomes a hole."""
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        parse(TEXT.replace(old, new))
