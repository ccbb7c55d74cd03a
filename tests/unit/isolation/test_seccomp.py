"""The seccomp table and its assembler keep their word without a kernel."""

from __future__ import annotations

from importlib import resources

import pytest

from cloister.errors import UnsupportedError
from cloister.isolation import seccomp
from cloister.isolation.seccomp_table import parse, table

TEXT = resources.files("cloister.isolation").joinpath("seccomp_table.toml").read_text(encoding="utf-8")
ARCHES = ["aarch64", "riscv64", "x86_64"]


def refused(**lifts):
    """Return the names of all system calls that some rule looks at."""
    groups = seccomp.active_groups(table(), **({"nested": False, "ptrace": False, "netlink": True} | lifts))
    return {rule.syscall for group in groups for rule in group.rules}


def test_has_a_table_for_each_promised_architecture():
    """x86_64, aarch64 and riscv64 have filters."""
    assert sorted(table().machines) == ARCHES


@pytest.mark.parametrize("arch", ARCHES)
def test_fits_the_kernel(arch):
    """A filter is whole instructions, and far fewer than the kernel's 4,096."""
    program = seccomp.assemble(arch)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 500


def test_unknown_architecture_is_refused():
    """No filter is ever made up: an architecture without a table cannot run."""
    with pytest.raises(UnsupportedError) as caught:
        seccomp.assemble("s390x")
    assert caught.value.reference == "seccomp-arch"
    assert "x86_64" in caught.value.remedy


def test_nested_lifts_namespaces_only():
    """`nested` gives an inner bubblewrap what it needs, and keyrings, io_uring and tracing stay refused."""
    gone = refused() - refused(nested=True)
    assert {"mount", "umount2", "pivot_root", "setns", "clone", "clone3", "unshare"} <= gone
    assert {"keyctl", "io_uring_setup", "bpf", "ptrace", "open_by_handle_at"} <= refused(nested=True)


def test_ptrace_lifts_tracing_only():
    """`ptrace` gives a debugger what it needs and nothing else."""
    gone = refused() - refused(ptrace=True)
    assert gone == {"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"}


def test_every_profile_has_bytes_of_its_own():
    """No lift is without effect, and the same profile always gives the same bytes."""
    profiles = [{}, {"nested": True}, {"ptrace": True}, {"netlink": False}]
    assert len({seccomp.assemble("x86_64", **profile) for profile in profiles}) == len(profiles)


def test_describe_tells_refusals_and_opt_outs():
    """The plan names each group with its reason, and shouts about what was lifted."""
    lines = seccomp.describe("x86_64", nested=True)
    assert any(line.startswith("refuse keyrings: add_key (EPERM), keyctl") for line in lines)
    assert any(line.startswith("LIFTED by hardening.nested: namespaces: mount") for line in lines)
    assert not any("LIFTED" in line for line in seccomp.describe("x86_64"))


def test_describe_names_only_calls_the_architecture_has():
    """The call iopl is of x86_64 alone; a plan for aarch64 does not claim to refuse it."""
    assert "iopl" in "\n".join(seccomp.describe("x86_64"))
    assert "iopl" not in "\n".join(seccomp.describe("aarch64"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"add_key", "keyctl"', '"add_key", "keyctI"', "keyctI"),
        ("keyctl = [250, 219]", "keyctl = [250, 219]\nkeyctx = [1, 2]", "keyctx"),
        ('errno = "EAFNOSUPPORT"', 'errno = "EWHAT"', "EWHAT"),
        ('in = ["AF_NETLINK"]', 'in = ["AF_NETLINC"]', "AF_NETLINC"),
        ("keyctl = [250, 219]", "keyctl = [400, 219]", "outside the known ranges: keyctl"),
        ("[allowed]", '[allowed]\nkeyctl = "no"', "both refused and allowed: keyctl"),
        ('in = ["PR_SET_MM"]', 'in = ["PR_SET_MM"], not_in = [0]', "either `in` or `not_in`"),
        ('lift = "ptrace"', 'lift = "sometimes"', "sometimes"),
        ("[errnos]", "[errnos]\nEDEADLK = 1.5", "Expected `int`"),
        ('syscalls = ["memfd_secret"]', 'sycalls = ["memfd_secret"]', "sycalls"),
    ],
)
def test_a_slip_in_the_table_is_an_error(old, new, message):
    """A misspelt call, constant, error or key stops the table from loading; it never becomes a hole."""
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        parse(TEXT.replace(old, new))
