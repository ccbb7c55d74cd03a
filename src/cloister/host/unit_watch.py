"""Having the kernel's audit watch a unit: its cgroup is handed to the sensor before anything of the agent runs in it.

Where the host records no kernel events, or the sensor refuses, the run goes on and is told: what the audit of kernel
events sees stands in the log itself (`log.tier`), and lifecycle, egress and model calls are recorded without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cloister.errors import CloisterError
from cloister.host.kernel_watches import cgroup_tree
from cloister.host.sensor_ask import SENSOR_SOCKET, ask

SENSOR_UNIT = "/etc/systemd/system/cloister-sensor.service"
"""Where this file is, kernel events are part of the system: their absence is worth a word."""


def watch(pid: int, fields: Mapping[str, str], socket: str = SENSOR_SOCKET) -> tuple[str, ...]:
    """Have the cgroup of a unit's first process watched; return what there is to say, nothing when all is well."""
    if not os.path.exists(SENSOR_UNIT):
        return ()
    try:
        descriptor = os.open(f"{cgroup_tree()}{_cgroup_of(pid)}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            ask(descriptor, fields, socket).close()
        finally:
            os.close(descriptor)
    except CloisterError as error:
        return (f"no kernel events of this run: {error}",)
    except OSError as error:
        return (f"no kernel events of this run: the sensor does not answer ({error.strerror or error})",)
    return ()


def _cgroup_of(pid: int) -> str:
    """Return a process's path in the tree of cgroup v2 (cgroups(7), /proc/PID/cgroup)."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if line.startswith("0::"):
                return line[3:].rstrip("\n")
    return ""
