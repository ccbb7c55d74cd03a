"""Weaken memory protection with personality."""

from cloister.prove.inside.support import Box, in_child, syscall

ID = "kernel-personality"
TITLE = "Weaken memory protection with personality"
PROMISE = "P-035"
CLASSES = (28,)
EXPECT = "seccomp answers EPERM for every domain but the plain one"
SHAPE = "any"


def attack(box: Box) -> None:
    """Executable data, memory at address zero, ancient interfaces; randomization off unless tracing is allowed."""
    kinds = {"READ_IMPLIES_EXEC": 0x400000, "MMAP_PAGE_ZERO": 0x100000, "PER_LINUX32": 8, "PER_SVR4": 0x4100001}
    if not box.facts.get("ptrace"):
        kinds["ADDR_NO_RANDOMIZE"] = 0x40000
    for name, value in kinds.items():
        box.refused(name, "EPERM", in_child, syscall, "personality", value)


def twin(box: Box) -> None:
    """Becoming what one is."""
    box.works("personality(PER_LINUX)", syscall("personality", 0) >= 0)
