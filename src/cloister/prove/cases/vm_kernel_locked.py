"""Change the guest's kernel: load modules, another kernel, its memory, its keys to the machine."""

import os

from cloister.prove.inside.support import Box, read, write

ID = "vm-kernel-locked"
TITLE = "Change the guest's kernel: modules, another kernel, its settings, its magic keys"
PROMISE = "P-851"
CLASSES = (28,)
EXPECT = "modules and kexec are locked for root as well; settings are root's, and read-only"
SHAPE = "any"
IF_POLICY = ("microvm",)

LOCKED = ("modules_disabled", "kexec_load_disabled", "dmesg_restrict")
SETTINGS = (
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/sys/power/state",
    "/sys/kernel/uevent_helper",
)


def attack(box: Box) -> None:
    """Ask the kernel what is locked, and try to unlock it."""
    for name in LOCKED:
        path = f"/proc/sys/kernel/{name}"
        if not os.path.exists(path):
            box.stopped(f"{name}: this kernel cannot do it at all")
            continue
        box.must(read(path).strip() not in ("", "0"), f"{name} is set")
        box.refused(f"write {name}", "EROFS EACCES EPERM", write, path, "0")
    for path in SETTINGS:
        # Opened and no more: the right is asked for here, and what is written there could end the guest.
        box.refused(path, "EROFS EACCES EPERM ENOENT", os.open, path, os.O_WRONLY)
    box.refused("/dev/mem", "ENOENT EACCES EPERM", read, "/dev/mem")


def twin(box: Box) -> None:
    """What programs ask the kernel for is still told."""
    box.works("settings can be read", read("/proc/sys/kernel/osrelease").strip() == os.uname().release)
    box.works("a name of the kernel's making", len(read("/proc/sys/kernel/random/uuid").strip()) > 0)
