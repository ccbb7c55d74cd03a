"""A filter that lets a guest give back memory that it shares with others: one system call that only seems to be made.

To give a page of a file back, QEMU punches a hole into the file (fallocate(2)) and then drops its own copy of the page
(madvise(2), MADV_DONTNEED). A template's file belongs to all its machines and is sealed, so the first call fails, and
the second is never made. Answered with success, it changes nothing for anybody, and the second gives back what this
machine had written there: what is read next is the template's page again. Whether that will do is for the guest's
kernel to say: it reports no free pages when it wants them empty (virtio-balloon without VIRTIO_BALLOON_F_PAGE_POISON,
drivers/virtio/virtio_balloon.c). On disks QEMU makes the same call for requests only that ours do not take (`qemu.py`).

Pure. The filter behind it is `isolation/seccomp.py`'s.
"""

from __future__ import annotations

import struct

from cloister.errors import UnsupportedError
from cloister.isolation.seccomp import ERRNO, JUMP_EQUAL, LOAD, OFFSET_ARCH, OFFSET_ARGS, OFFSET_NUMBER, RETURN
from cloister.isolation.seccomp_table import table

PUNCH = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h; with any other mode the call is made."""
_FALLOCATE = {"x86_64": 285, "aarch64": 47, "riscv64": 47}


def pretended(arch: str, behind: bytes) -> bytes:
    """Return a filter that answers holes with success, and leaves every other call to the filter `behind` it.

    Raises:
        UnsupportedError: `seccomp-arch`, the call's number is not known.
    """
    machine = table().machines.get(arch)
    if machine is None or arch not in _FALLOCATE:
        raise UnsupportedError("seccomp-arch", f"there is no system call table for {arch}")
    lines = [
        (LOAD, 0, 0, OFFSET_ARCH), (JUMP_EQUAL, 0, 5, machine.audit),
        (LOAD, 0, 0, OFFSET_NUMBER), (JUMP_EQUAL, 0, 3, _FALLOCATE[arch]),
        (LOAD, 0, 0, OFFSET_ARGS + 8), (JUMP_EQUAL, 0, 1, PUNCH),  # an int: the kernel looks at these 32 bits only
        (RETURN, 0, 0, ERRNO),
    ]  # fmt: skip
    return b"".join(struct.pack("<HBBI", *line) for line in lines) + behind
