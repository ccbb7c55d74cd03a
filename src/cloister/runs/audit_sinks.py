"""Where the events of a door go: to the system's keeper, or into a log that this process keeps for its user."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister.host.audit_log import Log
from cloister.host.audit_send import Sender, system_keeps
from cloister.plan.unit import AUDIT_SOCKET
from cloister.policy.model import Audit
from cloister.policy.units import parse_duration, parse_size
from cloister.runs.audit_door import Sink
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.paths import Paths

if TYPE_CHECKING:
    from cloister.runs.audit_exporter import Exporter

_WAKE_S = 2.0
"""After so long a keeper of our own loads its key: not while the first run is starting."""


def choose(paths: Paths, settings: Callable[[], Audit], source: str) -> Sink:
    """Return the system's keeper where there is one, however it may be; else a log of one's own."""
    if system_keeps():
        return SystemSink()
    return OwnSink(lambda: own_keeper(paths, settings(), source), Sending(paths, settings))


def own_keeper(paths: Paths, audit: Audit, source: str) -> Keeper:
    """Return the keeper of a user's own log, with nothing open yet."""
    os.makedirs(paths.state, mode=0o700, exist_ok=True)
    return Keeper(Log(paths.audit), paths.audit_key, rules_of(audit), source=source)


def rules_of(audit: Audit) -> Rules:
    """Return when segments end and go, by the policy."""
    rotate_s, retention_s = float(parse_duration(audit.rotate_every)), float(parse_duration(audit.retention))
    return Rules(parse_size(audit.rotate_size), rotate_s, retention_s)


class SystemSink:
    """The system's keeper."""

    def __init__(self, path: str = AUDIT_SOCKET, timeout_s: float = 5.0) -> None:
        """Connect with the first event."""
        self._path, self._timeout_s = path, timeout_s
        self._sender: Sender | None = None

    def write(self, events: list[bytes]) -> None:
        """Send events and wait for the keeper's word."""
        if self._sender is None:
            self._sender = Sender(self._path, self._timeout_s)
        try:
            self._sender.send(events)
        except OSError:
            self._sender = None
            raise

    def idle(self) -> None:
        """Nothing is due."""

    def close(self) -> None:
        """Let go of the connection."""
        if self._sender:
            self._sender.close()


class OwnSink:
    """A log that this process keeps itself."""

    def __init__(self, make: Callable[[], Keeper], sending: Sending | None = None) -> None:
        """Open it with the first event; `sending` sends it elsewhere."""
        self._make, self._sending = make, sending
        self._keeper: Keeper | None = None
        self._wake_at = 0.0

    def write(self, events: list[bytes]) -> None:
        """Write events."""
        if self._keeper is None:
            keeper = self._make()
            keeper.open()
            self._keeper, self._wake_at = keeper, time.monotonic() + _WAKE_S
        if events:
            self._keeper.put(events)
        self.idle()

    def idle(self) -> None:
        """Sign and rotate where that is due."""
        if self._keeper is None:
            return
        if self._wake_at and time.monotonic() >= self._wake_at:
            self._keeper.wake()
            self._wake_at = 0.0
        self._keeper.tick()
        if self._sending:
            self._sending.look()

    def close(self) -> None:
        """Close the log in order."""
        if self._keeper:
            self._keeper.close()
        if self._sending:
            self._sending.close()


class Sending:
    """What sends a log elsewhere, imported only where the policy names a receiver."""

    def __init__(self, paths: Paths, settings: Callable[[], Audit]) -> None:
        """Begin with the first look."""
        self._paths, self._settings = paths, settings
        self._exporter: Exporter | None = None

    def look(self) -> None:
        """See to it."""
        if self._exporter is None:
            audit = self._settings()
            if not (audit.syslog or audit.otlp):
                return
            from cloister.runs.audit_exporter import Exporter

            self._exporter = Exporter(self._paths, self._settings)
        self._exporter.look()

    def close(self) -> None:
        """Let go."""
        if self._exporter is not None:
            self._exporter.close()
