"""Open POSIX shared memory, semaphores and queues of the host."""

import ctypes
import os

from cloister.prove.inside.support import Box, read

ID = "ipc-posix"
TITLE = "Open POSIX shared memory, semaphores and queues of the host"
PROMISE = "P-042"
CLASSES = (44,)
EXPECT = "/dev/shm is private, and message queues belong to an IPC namespace"
SHAPE = "any"


def attack(box: Box) -> None:
    """The canary in /dev/shm, and queues by usual names."""
    for path in box.fact("shared_canaries"):
        if str(path).startswith("/dev/shm/"):
            box.refused(str(path), "ENOENT EACCES", read, str(path))
    box.must(all(name.startswith("cloister-prove") for name in os.listdir("/dev/shm")), "/dev/shm: nothing of the host")
    library = ctypes.CDLL(None, use_errno=True)
    for name in (b"/cloister-prove", b"/systemd", b"/queue"):
        handle = library.mq_open(name, os.O_RDONLY)
        box.must(handle == -1, f"{name.decode()}: {os.strerror(ctypes.get_errno())}")
    box.refused("/dev/mqueue", "ENOENT EACCES", os.listdir, "/dev/mqueue")
