"""The floor under the system calls of a unit: which words a list of `SystemCallFilter=` may have, and must have.

Not the filter of a run: that is the compiler's (`isolation/unit_properties.toml`) and the shim's own. Only these two
statements of one rule agree; a plan that allows one call more is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

# Lines add up in order (systemd.exec(5)): what is allowed, minus what is refused, plus what is allowed again.
_ALLOWED = frozenset(
    {
        *("@system-service", "@pkey", "seccomp"),
        *("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
    }
)
_NESTED = frozenset(
    {
        *("@mount", "capset", "pivot_root", "chroot", "sethostname", "setdomainname", "setns", "unshare", "clone3"),
    }
)
"""What an agent's own sandbox is built with."""
_REFUSED = frozenset(
    {
        *("@clock", "@cpu-emulation", "@debug", "@keyring", "@module", "@obsolete", "@raw-io", "@reboot", "@swap"),
        *("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "kcmp", "name_to_handle_at"),
        *("process_madvise", "process_vm_readv", "process_vm_writev"),
    }
)
_REFUSED_UNLESS_NESTED = frozenset({"@mount", "@privileged", "@resources"})


def worse_than_allowed(filters: Iterable[str], *, nested: bool) -> str:
    """Return the line or word by which a unit would get a system call that no agent gets; empty when there is none.

    Args:
        filters: the values, in order.
        nested: the owner's policy lets the agent build sandboxes of its own.
    """
    refused: set[str] = set()
    for number, line in enumerate(filters):
        words = set(line.removeprefix("~").split())
        if line.startswith("~"):
            if number == 0:
                return line  # a list of refusals alone allows all else
            refused |= words
            continue
        allowed = (_ALLOWED if not refused else frozenset()) | (_NESTED if nested else frozenset())
        if more := sorted(words - allowed):
            return more[0]
    missing = sorted((_REFUSED | (frozenset() if nested else _REFUSED_UNLESS_NESTED)) - refused)
    return f"~{missing[0]}" if missing else ""
