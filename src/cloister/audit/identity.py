"""The identity of a process that outlives its pid: the same for whoever knows boot, start and pid.

Its twin in C is `process_uid` (host/native/events.c). /proc/PID/stat tells the start in ticks only, so a uid can be
made where the kernel tells nanoseconds, and compared everywhere.
"""

from __future__ import annotations

import hashlib
import struct


def process_uid(boot_id: bytes, start_ns: int, pid: int) -> str:
    """Return 32 hexadecimal digits.

    Args:
        boot_id: 16 bytes of random(4)'s boot_id.
        start_ns: when it started, CLOCK_BOOTTIME in nanoseconds (task_struct's start_boottime).
        pid: of its first thread, as the host counts.
    """
    return hashlib.sha256(boot_id + struct.pack("<QI", start_ns, pid)).hexdigest()[:32]
