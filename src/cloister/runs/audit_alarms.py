"""Alarms of the audit: detections whose rule says `alarm` or `stop`, sent to people, by syslog or to a webhook.

A target of the export (`audit_targets`) like those of the whole log, with the same promises: at least once, and the log
is the queue. A webhook gets one POST per alarm, `{"text": words for people, "event": the event as recorded}`, which
chat services take as a message. The webhook's address is often its secret, so it stands in a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from cloister.audit.formats import Format
from cloister.audit.kept import Kept
from cloister.audit.rendering import Origin, visible
from cloister.host.audit_otlp import Collector, RefusedError
from cloister.host.audit_syslog import Trust
from cloister.runs.audit_targets import Item, SyslogTarget, Target

ACTIONS = frozenset({"alarm", "stop"})
_URL = re.compile(r"https://[^\s]+|http://(?:localhost|127\.0\.0\.1)(?::[0-9]{1,5})?/[^\s]*")
_MOST_URL = 4096
_MOST_BODY = 32 * 1024


def is_alarm(event: Kept) -> bool:
    """Tell whether an event is one that somebody shall hear of."""
    return event.kind == "detection.matched" and event.details.get("action") in ACTIONS


class AlarmTarget:
    """Sends alarms on, and passes over everything else."""

    def __init__(self, inner: Target) -> None:
        """Send to `inner`."""
        self._inner = inner
        self._passed = self._last = 0
        self.complaints = inner.complaints

    @property
    def arrived(self) -> int:
        """The number of the last line that needs not be sent again."""
        return max(self._passed, self._inner.arrived) if self._inner.arrived >= self._last else self._inner.arrived

    @arrived.setter
    def arrived(self, seq: int) -> None:
        """Take note of what had arrived before."""
        self._inner.arrived = self._passed = self._last = seq

    def put(self, items: Sequence[Item], origin: Origin) -> None:
        """Send what is an alarm."""
        if alarms := [item for item in items if is_alarm(item.record)]:
            self._last = alarms[-1].record.seq
            self._inner.put(alarms, origin)
        self._passed = items[-1].record.seq

    def look(self) -> None:
        """Bring `arrived` up to date."""
        self._inner.look()

    def close(self) -> None:
        """Let go of the connection."""
        self._inner.close()


class WebhookTarget:
    """Posts each event as JSON; an answer with 2xx is its arrival."""

    def __init__(self, url: str, trust: Trust) -> None:
        """Connect with the first one."""
        self._collector = Collector(url, trust)
        self.arrived = 0
        self.complaints: list[str] = []

    def put(self, items: Sequence[Item], origin: Origin) -> None:
        """Post one after the other."""
        for item in items:
            try:
                self._collector.send(body(item.record, origin))
            except RefusedError as error:
                self.complaints.append(f"alarm {item.record.seq} was refused: {error}")
            self.arrived = item.record.seq

    def look(self) -> None:
        """Nothing is to be heard between requests."""

    def close(self) -> None:
        """Let go of the connection."""
        self._collector.close()


def body(event: Kept, origin: Origin) -> bytes:
    """Return what is posted for an alarm; its text is one line without anything that could act."""
    words = f"{event.rule}: {event.message} (agent {event.agent or '-'}, run {event.run or '-'}, host {origin.host})"
    plain = msgspec.to_builtins(event)
    whole = msgspec.json.encode({"text": visible(words), "event": plain, "host": origin.host, "log": origin.log})
    if len(whole) <= _MOST_BODY:
        return whole
    return msgspec.json.encode({"text": visible(words)[:2000], "host": origin.host, "log": origin.log})


def target_of(where: str, form: Format, trust: Trust) -> AlarmTarget:
    """Return the target for `[audit] alarm`: a receiver of syslog, or `file:` and a file with a webhook's address.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no address of a webhook.
    """
    if not where.startswith("file:"):
        return AlarmTarget(SyslogTarget(where, form, trust))
    with open(where.removeprefix("file:"), encoding="utf-8") as file:
        url = file.read(_MOST_URL).strip()
    if not _URL.fullmatch(url):
        raise ValueError("the file of `audit.alarm` holds no https address of a webhook")
    return AlarmTarget(WebhookTarget(url, trust))
