"""Having the kernel's audit watch a sandbox of an ordinary user: by its pid namespace, which the user owns.

Only where the system records kernel events (`cloister setup`). It is asked for between the self-probe and the go, so
nothing of the agent runs unseen; the watch lasts as long as the connection.
"""

from __future__ import annotations

import os

from cloister.host.sandbox_pid import find_sandbox_pid
from cloister.plan.unit import RUNTIME

_SOCKET = f"{RUNTIME}/sensor.sock"
_TIMEOUT_S = 1.0


class Watching:
    """The watch of one sandbox, or why there is none."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._descriptor = -1
        self.trouble = ""

    def begin(self, outer_pid: int, run: str, agent: str) -> None:
        """Have it watched; nothing happens where the system records no kernel events."""
        if not os.path.exists(_SOCKET):
            return
        from cloister.errors import CloisterError
        from cloister.host.sensor_ask import ask

        try:
            namespace = os.open(f"/proc/{find_sandbox_pid(outer_pid)}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            try:
                asked = ask(namespace, {"run": run, "agent": agent}, _SOCKET, timeout_s=_TIMEOUT_S)
            finally:
                os.close(namespace)
            self._descriptor = os.dup(asked.fileno())
            asked.close()
        except CloisterError as error:
            self.trouble = f"no kernel events of this run: {error}"
        except OSError as error:
            self.trouble = f"no kernel events of this run: {error.strerror or error}"

    def end(self) -> None:
        """Let go. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
