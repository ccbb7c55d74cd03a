"""The version of the host's service manager, as its own program tells it."""

from __future__ import annotations

import re
import subprocess
from functools import cache

from cloister.errors import UnsupportedError
from cloister.host.programs import find

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_LIMIT_S = 10.0


@cache
def systemd_version() -> int:
    """Return the major version, such as 257.

    Raises:
        UnsupportedError: there is no systemctl that only root can change, or it does not tell.
    """
    program = find("systemctl", "").path
    told = ""
    if program:
        try:
            done = subprocess.run([program, "--version"], env=_ENVIRONMENT, capture_output=True, text=True,
                                  check=False, timeout=_LIMIT_S)  # fmt: skip
            told = done.stdout
        except (OSError, subprocess.TimeoutExpired):
            told = ""
    found = re.search(r"^systemd (\d+)", told, re.MULTILINE)
    if found is None:
        raise UnsupportedError("no-systemd", "systemctl is not there, or does not tell its version", where=program)
    return int(found[1])
