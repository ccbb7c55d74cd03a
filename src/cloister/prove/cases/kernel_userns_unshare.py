"""Make new namespaces with unshare."""

import os

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-userns-unshare"
TITLE = "Make new namespaces with unshare"
PROMISE = "P-033"
CLASSES = (27,)
EXPECT = "seccomp answers EPERM for every kind"
SHAPE = "any"
LIFTED_BY = ("hardening.nested",)


FLAGS = {
    "user": 0x10000000,
    "mount": 0x20000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
    "cgroup": 0x2000000,
    "time": 0x80,
}


def attack(box: Box) -> None:
    """Try each kind alone, and behind a user namespace."""
    for name, flag in FLAGS.items():
        for flags in (flag, flag | FLAGS["user"]):
            box.refused(f"unshare {name} ({flags:#x})", "EPERM", in_child, syscall, "unshare", flags)
    box.refused("high bits beside CLONE_NEWUSER", "EPERM EINVAL", in_child, syscall, "unshare", 1 << 40 | FLAGS["user"])


def twin(box: Box) -> None:
    """A child process, and an unshare that makes no namespace (CLONE_FILES)."""
    in_child(lambda: syscall("unshare", 0x400))
    box.works("fork", os.waitstatus_to_exitcode(os.system("true")) == 0)
