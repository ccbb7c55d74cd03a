"""A user's own log is sent elsewhere by a process beside the broker: this starts it where the policy names a receiver.

It looks again about once a second: a receiver that the policy names later, or no longer, counts at once, and a process
that ended is started again. The process holds on to the broker by its standard input, and sends what is left for a
while when that ends. The system's log has a unit of its own for it (`isolation/export_units.py`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable

from cloister.errors import CloisterError
from cloister.policy.model import Audit
from cloister.runs.paths import Paths

MODULE = "cloister.services.audit_export"
_AGAIN_S = 5.0
"""Between two starts: another broker's process may still be sending what was left."""


class Exporter:
    """The process, where there must be one."""

    def __init__(self, paths: Paths, settings: Callable[[], Audit]) -> None:
        """Start nothing yet; `settings` returns `[audit]` of the policy as it is now."""
        self._paths, self._settings = paths, settings
        self._process: subprocess.Popen[bytes] | None = None
        self._words: tuple[str, ...] = ()
        self._next = 0.0

    def look(self) -> None:
        """Start, stop or replace the process, as the policy says. Never raises: a log is kept also when not sent."""
        try:
            words = self._wanted()
        except CloisterError:
            return  # a broken policy changes nothing
        if words != self._words:
            self.close()
            self._words, self._next = words, 0.0
        if words and time.monotonic() >= self._next and (self._process is None or self._process.poll() is not None):
            self._next = time.monotonic() + _AGAIN_S
            with contextlib.suppress(OSError):
                self._start(words)

    def close(self) -> None:
        """Let go of the process: it sends what is left for a while, and ends."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0)

    def _wanted(self) -> tuple[str, ...]:
        """Return the words of the process; none where nothing is to be sent."""
        audit = self._settings()
        if not (audit.syslog or audit.otlp or audit.alarm):
            return ()
        words = ["--log", self._paths.audit, "--cursors", f"{self._paths.state}/audit-export", "--format", audit.format]
        for name in ("syslog", "otlp", "ca", "certificate"):
            value = getattr(audit, name)
            if value:
                words += [f"--{name}", self._paths.home + value[1:] if value.startswith("~/") else value]
        if audit.alarm:
            words += ["--alarm", audit.alarm.replace("file:~/", f"file:{self._paths.home}/", 1)]
        return (*words, "--lifeline")

    def _start(self, words: tuple[str, ...]) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        os.makedirs(self._paths.state, mode=0o700, exist_ok=True)
        with open(f"{self._paths.state}/audit-export.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", MODULE, *words],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env={}, cwd="/", start_new_session=True,
            )  # fmt: skip
