"""Read or write the guest's disks past their file systems."""

import os

from cloister.prove.inside.support import Box

ID = "vm-disks"
TITLE = "Read or write the guest's disks past their file systems"
PROMISE = "P-850"
CLASSES = (28, 34)
EXPECT = "their devices are root's, or not there"
SHAPE = "any"
IF_POLICY = ("microvm",)

DEVICES = ("vda", "vdb", "vdc", "dm-0", "mapper/root", "mapper/control", "hwrng", "ttyS0", "console", "port", "kmem")
PLACES = ("/dev", "/run/cloister/private/dev")
"""Where programs look, and where the guest's first process keeps its own."""


def attack(box: Box) -> None:
    """By name, by whatever else is in /dev, and by a node of one's own."""
    for path in (f"{place}/{name}" for place in PLACES for name in DEVICES):
        for flags in (os.O_RDONLY, os.O_WRONLY):
            box.refused(path, "ENOENT EACCES EPERM", os.open, path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    known = {
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "ptmx",
        "pts",
        "shm",
        "fd",
        "stdin",
        "stdout",
        "stderr",
    }
    others = sorted(set(os.listdir("/dev")) - known)
    opened = [name for name in others if not os.path.isdir(f"/dev/{name}") and os.access(f"/dev/{name}", os.R_OK)]
    box.must(not opened, f"no other device can be read: {' '.join(opened)}")
    for place in ("/tmp", box.workspace, box.home):
        box.refused(f"mknod in {place}", "EPERM EACCES", os.mknod, f"{place}/node", 0o60600, os.makedev(254, 0))


def twin(box: Box) -> None:
    """What every program needs is there."""
    with open("/dev/urandom", "rb") as source, open("/dev/null", "wb") as sink:
        box.works("urandom and null", sink.write(source.read(16)) == 16)
