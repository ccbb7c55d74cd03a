"""Gain capabilities or another identity."""

import ctypes
import os
import struct
import subprocess

from cloister.prove.inside.support import Box, in_child

ID = "kernel-capabilities"
TITLE = "Gain capabilities or another identity"
PROMISE = "P-039"
CLASSES = (18,)
EXPECT = "no capability in any set, no_new_privs, and the kernel's own EPERM"
SHAPE = "any"


ZERO = "0" * 16


def attack(box: Box) -> None:
    """Look at the sets, here and behind an exec; then ask for more."""
    for name, text in (
        ("here", open("/proc/self/status").read()),
        ("after exec", subprocess.check_output(["/bin/cat", "/proc/self/status"], text=True)),
    ):
        fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            box.must(fields[key] == ZERO, f"{key} {name} {fields[key]}")
        box.must(fields["NoNewPrivs"] == "1", f"NoNewPrivs {name} {fields['NoNewPrivs']}")
        box.must(fields["Seccomp"] == "2", f"Seccomp {name} {fields['Seccomp']}")
    box.refused("capset", "EPERM", in_child, capset)
    box.refused("setgroups", "EPERM", in_child, os.setgroups, [0])
    if os.getuid():
        box.refused("setuid(0)", "EPERM EINVAL", in_child, os.setuid, 0)


def capset() -> None:
    """Ask for CAP_SYS_ADMIN (capset(2), version 3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", 1 << 21, 1 << 21, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")
