"""e2fsprogs for the disks of virtual machines, with the filter of their jail: where `host` and `isolation` meet."""

from __future__ import annotations

import os
import platform

from cloister.host import e2fs, programs
from cloister.isolation.seccomp_narrow import assemble_narrow


def disk_tools(bubblewrap: str = "") -> e2fs.Tools:
    """Return the programs; `bubblewrap` is looked for where it is not known.

    Raises:
        UnsupportedError: one is missing, or there is no filter for this machine.
    """
    search = os.environ.get("PATH", "")
    machine = platform.machine()
    filters = e2fs.Filters(assemble_narrow(machine, "disk-tool"), assemble_narrow(machine, "disk-reader"))
    return e2fs.find_tools(bubblewrap or programs.find("bwrap", search).path, filters, search)
