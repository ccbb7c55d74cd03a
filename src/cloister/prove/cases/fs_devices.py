"""Open the host's devices."""

import os
import stat

from cloister.prove.inside.support import Box

ID = "fs-devices"
TITLE = "Open the host's devices"
PROMISE = "P-018"
CLASSES = (11,)
EXPECT = "/dev holds only harmless ones"
SHAPE = "any"


HARMLESS = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)}
"""null, zero, full, random, urandom, tty, ptmx (Documentation/admin-guide/devices.txt)."""
NAMES = (
    "mem",
    "kmem",
    "port",
    "kvm",
    "fuse",
    "kmsg",
    "net/tun",
    "loop-control",
    "loop0",
    "sda",
    "vda",
    "nvme0n1",
    "mapper/control",
    "vhost-net",
    "vhost-vsock",
    "vsock",
    "uinput",
    "input/event0",
    "snd/controlC0",
    "dri/card0",
    "tty0",
    "ttyS0",
    "console",
    "rtc0",
    "watchdog",
    "cpu/0/msr",
    "userfaultfd",
    "hpet",
    "autofs",
    "bus/usb/001/001",
    "tpm0",
)


def attack(box: Box) -> None:
    """By name, and everything that is there by number."""
    for name in NAMES:
        path = f"/dev/{name}"
        if name == "console" and os.path.exists(path):
            continue
        box.refused(path, "ENOENT ENOTDIR EACCES", os.open, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    for folder, _, files in os.walk("/dev"):
        for name in files:
            info = os.lstat(f"{folder}/{name}")
            if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                number = (os.major(info.st_rdev), os.minor(info.st_rdev))
                harmless = number in HARMLESS or number[0] in range(136, 144)
                box.must(harmless, f"{folder}/{name} is {number[0]}:{number[1]}")


def twin(box: Box) -> None:
    """The ordinary ones work."""
    with open("/dev/urandom", "rb") as source, open("/dev/null", "wb") as sink:
        box.works("random numbers", sink.write(source.read(8)) == 8)
