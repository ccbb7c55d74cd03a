"""Whether a directory's file system has idmapped mounts, as far as that can be told without making one.

An ordinary user cannot try, so what is known stands here: file systems with FS_ALLOW_IDMAP in the kernel's sources,
and since which Linux. A wrong no costs a copy or a shared group; a wrong yes is found when the mount is made.
"""

from __future__ import annotations

import ctypes
import os
import re

_SIZE = 256
_SINCE: dict[int, tuple[int, int]] = {
    0xEF53: (5, 12),  # ext4
    0x58465342: (5, 12),  # xfs
    0x4D44: (5, 12),  # vfat
    0x9123683E: (5, 15),  # btrfs
    0xF2F52010: (5, 18),  # f2fs
    0x01021994: (6, 3),  # tmpfs
    0x00C36400: (6, 7),  # ceph
}
"""By the number that statfs(2) tells."""

_libc = ctypes.CDLL(None, use_errno=True)


def has_idmapped_mounts(directory: int) -> bool:
    """Say whether the file system of an open directory is known to have them on this kernel.

    Raises:
        OSError: it does not answer.
    """
    found = ctypes.create_string_buffer(_SIZE)
    if _libc.fstatfs(directory, found) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    kind = ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF
    numbers = [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]]
    return kind in _SINCE and tuple(numbers) >= _SINCE[kind]
