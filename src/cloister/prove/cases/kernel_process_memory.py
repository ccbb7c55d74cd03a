"""Read and write the memory of another process with process_vm_readv."""

import ctypes
import os
import struct

from cloister.prove.inside.support import Box, syscall

ID = "kernel-process-memory"
TITLE = "Read and write the memory of another process with process_vm_readv"
PROMISE = "P-034"
CLASSES = (25,)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"
LIFTED_BY = ("hardening.ptrace",)


def attack(box: Box) -> None:
    """Aim at the driver, at PID 1, and at the process itself."""
    data = ctypes.create_string_buffer(16)
    vector = struct.pack("<QQ", ctypes.addressof(data), 16)
    for name, pid in (("the driver", os.getppid()), ("PID 1", 1), ("itself", os.getpid())):
        for call in ("process_vm_readv", "process_vm_writev"):
            box.refused(f"{call} {name}", "EPERM", syscall, call, pid, vector, 1, vector, 1, 0)
