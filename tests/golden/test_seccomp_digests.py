"""The filter bytes are a security promise: a change of any bit must be seen and wanted."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cloister.isolation import seccomp

GOLDEN = Path(__file__).parent / "seccomp.digests"
PROFILES = {"default": {}, "nested": {"nested": True}, "ptrace": {"ptrace": True}, "no-netlink": {"netlink": False}}


def test_filter_bytes_are_the_reviewed_ones():
    """Architecture, profile, instructions and SHA-256 stand in seccomp.digests, one line each.

    After a wanted change of the table, replace the lines by those this test prints.
    """
    lines = []
    for arch in ("aarch64", "riscv64", "x86_64"):
        for profile, lifts in PROFILES.items():
            program = seccomp.assemble(arch, **lifts)
            lines.append(f"{arch} {profile} {len(program) // 8} {hashlib.sha256(program).hexdigest()}")
    assert lines == GOLDEN.read_text(encoding="utf-8").splitlines(), "\n".join(lines)
