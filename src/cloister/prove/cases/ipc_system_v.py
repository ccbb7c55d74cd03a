"""Attach to System V shared memory, semaphores and queues of the host or of another run."""

from cloister.prove.inside.support import Box, read, syscall

ID = "ipc-system-v"
TITLE = "Attach to System V shared memory, semaphores and queues of the host or of another run"
PROMISE = "P-042"
CLASSES = (44,)
EXPECT = "an own IPC namespace, empty at the start"
SHAPE = "any"
NEEDS = ("sibling",)


def attack(box: Box) -> None:
    """By key, by number, and by the lists of /proc."""
    box.refused("shmget of the neighbour's key", "ENOENT", syscall, "shmget", int(box.fact("sibling")["key"]), 0, 0)
    for identifier in range(8):
        box.refused(f"shmat {identifier}", "EINVAL EIDRM EACCES", syscall, "shmat", identifier, 0, 0o10000)
    for kind in ("shm", "sem", "msg"):
        lines = read(f"/proc/sysvipc/{kind}", 4000).splitlines()
        box.must(len(lines) <= 1, f"{kind}: {len(lines) - 1} listed")


def twin(box: Box) -> None:
    """Own segments work."""
    identifier = syscall("shmget", 0, 4096, 0o1600)
    box.works("a segment", identifier >= 0)
    syscall("shmctl", identifier, 0, 0)
