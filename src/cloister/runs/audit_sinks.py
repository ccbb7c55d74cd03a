"""Where the events of a door go: to the system's keeper, or into a log that this process keeps for its user."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import CloisterError
from cloister.host.audit_log import Log
from cloister.host.audit_send import Sender, system_keeps
from cloister.plan.unit import AUDIT_SOCKET
from cloister.policy.model import Audit
from cloister.policy.units import parse_duration, parse_size
from cloister.runs.audit_detections import Order, Watch, watch
from cloister.runs.audit_door import Sink
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.paths import Paths

if TYPE_CHECKING:
    from cloister.runs.audit_exporter import Exporter

_WAKE_S = 2.0
"""After so long a keeper of our own loads its key: not while the first run is starting."""


def choose(
    paths: Paths, settings: Callable[[], Audit], source: str, ordered: Callable[[Order], None] = lambda _: None
) -> Sink:
    """Return the system's keeper where there is one, however it may be; else a log of one's own.

    Args:
        paths: where a log of one's own is kept.
        settings: returns `[audit]`.
        source: what this process is called.
        ordered: told, in the thread of the sink, which run a detection wants stopped.
    """
    if system_keeps():
        return SystemSink(ordered=ordered)
    return OwnSink(
        lambda: own_keeper(paths, settings(), source), Sending(paths, settings), Watching(paths, settings, ordered)
    )


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

    def __init__(
        self, path: str = AUDIT_SOCKET, timeout_s: float = 5.0, *, ordered: Callable[[Order], None] = lambda _: None
    ) -> None:
        """Connect with the first event."""
        self._path, self._timeout_s, self._ordered = path, timeout_s, ordered
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
        self._obey(self._sender)

    def idle(self) -> None:
        """Take the keeper's orders."""
        if self._sender is None:
            return
        try:
            self._sender.look()
        except OSError:
            self._sender = None  # the next event, or the next look, connects anew
            return
        self._obey(self._sender)

    def _obey(self, sender: Sender) -> None:
        for order in sender.orders:
            with contextlib.suppress(msgspec.DecodeError):
                self._ordered(msgspec.json.decode(order, type=Order))
        sender.orders.clear()

    def close(self) -> None:
        """Let go of the connection."""
        if self._sender:
            self._sender.close()


class OwnSink:
    """A log that this process keeps itself."""

    def __init__(
        self, make: Callable[[], Keeper], sending: Sending | None = None, watching: Watching | None = None
    ) -> None:
        """Open it with the first event; `sending` sends it elsewhere, `watching` looks for what is worth telling."""
        self._make, self._sending, self._watching = make, sending, watching
        self._keeper: Keeper | None = None
        self._wake_at = 0.0

    def write(self, events: list[bytes]) -> None:
        """Write events."""
        if self._keeper is None:
            keeper = self._make()
            keeper.open()
            self._keeper, self._wake_at = keeper, time.monotonic() + _WAKE_S
            if self._watching:
                self._watching.begin(keeper)
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
        if self._watching:
            self._watching.look()
        self._keeper.tick()
        if self._sending:
            self._sending.look()

    def close(self) -> None:
        """Close the log in order."""
        if self._watching:
            self._watching.close()
        if self._keeper:
            self._keeper.close()
        if self._sending:
            self._sending.close()


class Watching:
    """The detections of a log that this process keeps, by the policy as it is now."""

    def __init__(self, paths: Paths, settings: Callable[[], Audit], ordered: Callable[[Order], None]) -> None:
        """Begin with the keeper."""
        self._paths, self._settings, self._ordered = paths, settings, ordered
        self._watch: Watch | None = None

    def begin(self, keeper: Keeper) -> None:
        """Look at what this keeper writes from now on.

        Raises:
            OSError: what is wrong with the policy's rules could not be written down.
        """
        self._watch, wrong = watch(keeper, self._settings(), self._paths.audit, self._ordered, source="broker")
        if wrong:
            keeper.say("log.trouble", f"the policy's rules are not in force: {wrong}", {}, severity=4)

    def look(self) -> None:
        """Obey the policy where it has changed; wrong rules change nothing, and `cloister check` says what is wrong."""
        if self._watch:
            with contextlib.suppress(CloisterError):
                self._watch.obey(self._settings())

    def close(self) -> None:
        """Remember what was seen."""
        if self._watch:
            self._watch.close()


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
            if not (audit.syslog or audit.otlp or audit.alarm):
                return
            from cloister.runs.audit_exporter import Exporter

            self._exporter = Exporter(self._paths, self._settings)
        self._exporter.look()

    def close(self) -> None:
        """Let go."""
        if self._exporter is not None:
            self._exporter.close()
