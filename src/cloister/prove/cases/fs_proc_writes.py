"""Change the host through files of /proc."""

import os

from cloister.prove.inside.support import Box

ID = "fs-proc-writes"
TITLE = "Change the host through files of /proc"
PROMISE = "P-019"
CLASSES = (28, 37)
EXPECT = "read-only, absent or without privilege"
SHAPE = "any"


FILES = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/randomize_va_space",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/fs/binfmt_misc/register",
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/yama/ptrace_scope",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/1/uid_map",
    "/proc/self/uid_map",
    "/proc/acpi/wakeup",
    "/proc/mtrr",
    "/proc/irq/0/smp_affinity",
    "/proc/sys/user/max_user_namespaces",
)


def attack(box: Box) -> None:
    """Open for writing; write what is there back when that works."""
    for path in FILES:
        box.refused(path, "EROFS EACCES EPERM ENOENT EINVAL", rewrite, path)


def rewrite(path: str) -> None:
    """Write a file's own first line back, which changes nothing and still proves that it could."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with open(path, "rb") as file:
            text = file.readline()
        os.write(descriptor, text or b"\n")
    finally:
        os.close(descriptor)
