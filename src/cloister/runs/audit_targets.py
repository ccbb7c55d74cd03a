"""Receivers of the audit's export, one class each: what is sent to them, and what is known to have arrived.

A target gets lines in order. It says by `arrived` up to which number nothing has to be sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cloister.audit import otlp, syslog
from cloister.audit.formats import Format, renderer
from cloister.audit.kept import Kept
from cloister.audit.rendering import Origin
from cloister.host.audit_otlp import Collector, RefusedError, WaitError
from cloister.host.audit_syslog import Datagrams, Local, Stream, Trust, split_address

OTLP_BATCH = 500
"""Records in one request: some hundred kilobytes."""
_OTLP_TEXT = 32 * 1024


class Item(NamedTuple):
    """One line of the log, as it stands there and as a value."""

    raw: bytes
    record: Kept


class Target(Protocol):
    """One receiver."""

    arrived: int
    """The number of the last line that needs not be sent again."""
    complaints: list[str]
    """What the receiver refused, for people; emptied by whoever tells it."""

    def put(self, items: Sequence[Item], origin: Origin) -> None:
        """Send lines.

        Raises:
            OSError: it does not work now; what has not `arrived` must be put again.
        """

    def look(self) -> None:
        """Bring `arrived` up to date.

        Raises:
            OSError: the receiver went away.
        """

    def close(self) -> None:
        """Let go of the connection."""


class SyslogTarget:
    """A receiver of syslog."""

    def __init__(self, url: str, form: Format, trust: Trust) -> None:
        """Connect with the first line; `url` is one that `policy.values.check_syslog` took."""
        self._form: Format = form
        self._wire: Datagrams | Stream | Local
        if url == "unix":
            self._wire = Local()
        else:
            scheme, host, port = split_address(url)
            if scheme == "udp":
                self._wire = Datagrams(host, port)
            else:
                self._wire = Stream(host, port, trust if scheme == "tls" else None)
        self.complaints: list[str] = []

    @property
    def arrived(self) -> int:
        """The number of the last line that needs not be sent again."""
        return self._wire.arrived

    @arrived.setter
    def arrived(self, seq: int) -> None:
        """Take note of what had arrived before."""
        self._wire.arrived = seq

    def put(self, items: Sequence[Item], origin: Origin) -> None:
        """Send lines, each as one message."""
        for item in items:
            self._wire.send(item.record.seq, self._message(item, origin))

    def _message(self, item: Item, origin: Origin) -> bytes:
        render = renderer(self._form, item.record, item.raw)
        match self._wire:
            case Local(native=True):
                return syslog.journal_entry(item.record, origin, render)
            case Local():
                return syslog.dev_log_line(item.record, origin, render)
            case Datagrams():
                return syslog.message(item.record, origin, render, octets=syslog.MAX_UDP_OCTETS)
            case Stream():
                return syslog.octet_counted(syslog.message(item.record, origin, render))

    def look(self) -> None:
        """Bring `arrived` up to date."""
        self._wire.look()

    def close(self) -> None:
        """Let go of the connection."""
        self._wire.close()


class OtlpTarget:
    """A collector of OpenTelemetry."""

    def __init__(self, url: str, trust: Trust) -> None:
        """Connect with the first request."""
        self._collector = Collector(url, trust)
        self.arrived = 0
        self.complaints: list[str] = []

    def put(self, items: Sequence[Item], origin: Origin) -> None:
        """Send lines in requests of some hundred."""
        for start in range(0, len(items), OTLP_BATCH):
            self._send([item.record for item in items[start : start + OTLP_BATCH]], origin)

    def _send(self, records: Sequence[Kept], origin: Origin) -> None:
        """Send records; what a collector will never take is narrowed down to single records, which are left out."""
        short = [syslog.shortened(record, _OTLP_TEXT) for record in records]
        try:
            said = self._collector.send(otlp.request(short, origin))
        except RefusedError as error:
            if len(records) > 1:
                middle = len(records) // 2
                self._send(records[:middle], origin)
                self._send(records[middle:], origin)
                return
            said = f"event {records[0].seq} was refused: {error}"
        if said:
            self.complaints.append(said)
        self.arrived = records[-1].seq

    def look(self) -> None:
        """Nothing is to be heard between requests."""

    def close(self) -> None:
        """Let go of the connection."""
        self._collector.close()


def waiting_of(error: OSError) -> float:
    """Return how long a receiver asked us to wait, in seconds; 0 where it did not."""
    return error.wait_s if isinstance(error, WaitError) else 0.0
