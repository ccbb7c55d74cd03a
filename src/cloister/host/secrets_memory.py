"""Keeping the memory of a process that reads secrets to itself.

RLIMIT_CORE alone is not enough: a core dump that is piped to a program ignores it (core(5)),
and systemd-coredump is one. A process that is not dumpable leaves none, and other processes of
its user cannot read its memory or environment (prctl(2), PR_SET_DUMPABLE).
"""

from __future__ import annotations

import ctypes
import os
import resource

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def keep_memory_private() -> None:
    """Let no core dump be written of this process, and nobody but root look into it.

    Raises:
        OSError: the kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    forbid_looking()


def forbid_looking() -> None:
    """Do so for this process only: limits are inherited by programs that it starts, this is not.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
