"""Load programs into the kernel with bpf."""

from cloister.prove.inside.support import Box, syscall

ID = "kernel-bpf"
TITLE = "Load programs into the kernel with bpf"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"


def attack(box: Box) -> None:
    """Make a map, load a program, look for those of others."""
    for name, command in (
        ("BPF_MAP_CREATE", 0),
        ("BPF_PROG_LOAD", 5),
        ("BPF_PROG_GET_NEXT_ID", 11),
        ("BPF_OBJ_GET", 7),
    ):
        box.refused(name, "EPERM", syscall, "bpf", command, bytes(128), 128)
