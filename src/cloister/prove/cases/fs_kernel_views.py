"""Look at the host through /sys, cgroups, and views of kernel memory."""

import os

from cloister.prove.inside.support import Box, read

ID = "fs-kernel-views"
TITLE = "Look at the host through /sys, cgroups, and views of kernel memory"
PROMISE = "P-018"
CLASSES = (34, 28)
EXPECT = "/sys is not there; the rest is empty or refused"
SHAPE = "any"


def attack(box: Box) -> None:
    """Directories by listing, files by reading."""
    guest = box.facts.get("guest")
    for path in ("/sys/kernel", "/sys/fs/cgroup", "/sys/class/net", "/sys/devices"):
        if guest:  # a guest has a kernel of its own, and shows it read-only
            box.refused(f"{path}/x", "EROFS EACCES EPERM ENOENT", os.mkdir, f"{path}/x")
            continue
        box.refused(path, "ENOENT EACCES", os.listdir, path)
    for path in ("/sys/kernel/debug", "/boot", "/lost+found", "/mnt", "/media", "/srv"):
        if guest and os.path.isdir(path) and os.access(path, os.R_OK):
            box.must(not os.listdir(path), f"{path}: the image's own, and empty")
            continue
        box.refused(path, "ENOENT EACCES", os.listdir, path)
    for path in (
        "/proc/kcore",
        "/proc/vmallocinfo",
        "/proc/slabinfo",
        "/proc/kpagecount",
        "/proc/1/maps",
        "/proc/1/stack",
    ):
        box.refused(path, "ENOENT EACCES EPERM", read, path)
    try:
        addresses = [line.split()[0] for line in read("/proc/kallsyms", 2000).splitlines()[:-1]]
    except PermissionError:
        box.stopped("/proc/kallsyms: EACCES")
        return
    box.must(not any(set(address) - {"0"} for address in addresses), "/proc/kallsyms shows no address")
