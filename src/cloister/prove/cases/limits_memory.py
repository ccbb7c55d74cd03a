"""Use up the memory."""

import mmap
import os

from cloister.prove.inside.support import Box

ID = "limits-memory"
TITLE = "Use up the memory"
PROMISE = "P-068"
CLASSES = (85,)
EXPECT = "allocation fails, or the process is ended at the limit; with oom = kill or stop its unit"
ENDED_BY = "oom-killed"
FRESH = True
LIFTED_BY = ("limits.memory_max is not set",)


def attack(box: Box) -> None:
    """A child touches memory beyond the limit, at most 8 GiB."""
    limit = int(box.fact("memory_bytes"))
    child = os.fork()
    if child == 0:
        kept = []
        try:
            for _ in range(min(limit * 2, 8 << 30) // (16 << 20)):
                block = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                block[:: mmap.PAGESIZE] = b"x" * ((16 << 20) // mmap.PAGESIZE)
                kept.append(block)
        except (OSError, MemoryError):
            os._exit(7)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    box.must(status != 0, f"wait status {status}")
