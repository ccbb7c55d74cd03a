"""Load kernel modules, another kernel, or stop the machine."""

from cloister.prove.inside.support import Box, syscall

ID = "kernel-modules"
TITLE = "Load kernel modules, another kernel, or stop the machine"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"


def attack(box: Box) -> None:
    """All of these need privilege as well; the filter comes first, and answers for every argument."""
    box.refused("init_module", "EPERM", syscall, "init_module", b"x", 1, b"")
    box.refused("finit_module", "EPERM", syscall, "finit_module", -1, b"", 0)
    box.refused("delete_module", "EPERM", syscall, "delete_module", b"nothing", 0)
    box.refused("kexec_load", "EPERM", syscall, "kexec_load", 0, 0, 0, 1)
    box.refused("reboot with a wrong magic", "EPERM", syscall, "reboot", 1, 2, 3, 0)
    box.refused("swapon", "EPERM", syscall, "swapon", b"/nothing", 0)
    box.refused("acct", "EPERM", syscall, "acct", b"/nothing")
