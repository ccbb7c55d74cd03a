"""An event in the words of a line, for tables and timelines. Text is as the agent chose it: who shows it escapes it."""

from __future__ import annotations

import errno
import shlex

from cloister.audit.event import Endpoint, Event, File, Process
from cloister.audit.kinds import kinds

_VERBS = {
    "file.opened": "opened",
    "file.created": "created",
    "file.deleted": "deleted",
    "file.renamed": "renamed",
    "file.attributes-changed": "changed attributes of",
    "file.mounted": "mounted",
    "network.connected": "connects to",
    "network.sent": "sends to",
    "network.bound": "listens on",
    "process.traced": "traces",
    "process.forked": "forked",
    "process.exited": "ended",
    "process.uid-changed": "changed its user id",
}
_KIB = 1024
_NS = 1_000_000_000
_MS = 1_000_000
LANES = ("life", "process", "file", "network", "model", "credential", "alarm")
_LANES = {
    "run": "life", "step": "life", "policy": "life", "hostd": "life", "log": "life", "process": "process",
    "file": "file", "network": "network", "egress": "network", "model": "model", "credential": "credential",
    "signing": "credential", "identity": "credential", "detection": "alarm", "firewall": "alarm", "kernel": "process",
}  # fmt: skip
"""Which lane of a timeline an event belongs to, by the first word of its kind."""


def lane(event: Event) -> str:
    """Return the lane of a timeline for an event."""
    return _LANES.get(event.kind.partition(".")[0], "life")


def describe(event: Event) -> str:
    """Return what happened, in one line without time, run and agent."""
    group = event.kind.partition(".")[0]
    if group in {"file", "process", "network", "kernel"}:
        parts = _seen_by_kernel(event)
    elif group == "egress":
        parts = _egress(event)
    elif event.model:
        model = event.model
        parts = [f"{model.provider} {model.name}", f"{model.tokens:,} tokens" if model.tokens else ""]
        parts += [f"${model.cost_usd:,.4f}" if model.cost_usd else "", duration(event.duration_ns)]
    else:
        parts = [event.message or _named(event), event.credential, endpoint(event.endpoint)]
        parts += [event.rule, f"ran {duration(event.duration_ns)}" if event.duration_ns else ""]
    parts += [event.reason if group != "egress" or event.disposition != "allowed" else "", error(event.error)]
    parts += [f"x{event.count:,}" if event.count > 1 else ""]
    if not event.message:
        parts += [f"{name}={value}" for name, value in event.details.items()]
    return "  ".join(part for part in parts if part)


def process(held: Process | None) -> str:
    """Return a process as `name[pid]`."""
    if held is None:
        return ""
    return f"{held.name or held.path.rpartition('/')[2] or '?'}[{held.pid}]"


def command(held: Process) -> str:
    """Return what a process runs: its arguments, else its path."""
    words = shlex.join(held.cmd_line) if held.cmd_line else held.path
    return f"{words} …" if held.truncated else words


def endpoint(held: Endpoint | None) -> str:
    """Return the other side of a connection as `tls github.com:443 (198.51.100.7)`."""
    if held is None:
        return ""
    if held.path:
        return f"unix {held.path}"
    name = held.hostname or held.ip
    shown = f"[{name}]" if ":" in name else name
    port = f":{held.port}" if held.port else ""
    address = f" ({held.ip})" if held.ip and held.ip != name else ""
    return f"{held.protocol} {shown}{port}{address}".strip()


def error(number: int) -> str:
    """Return an errno by its name."""
    return errno.errorcode.get(number, f"error {number}") if number else ""


def duration(nanoseconds: int) -> str:
    """Return a length of time: `0.4 ms`, `140 ms`, `2.1 s`, `3 min 5 s`, `2 h 4 min`."""
    if nanoseconds <= 0:
        return ""
    if nanoseconds < _NS:
        amount = nanoseconds / _MS
        return f"{amount:.1f} ms" if amount < 10 else f"{amount:.0f} ms"  # noqa: PLR2004  # two digits that matter
    seconds = nanoseconds / _NS
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004


def size(count: int) -> str:
    """Return bytes for people: `512 B`, `1.5 MiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < _KIB:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _KIB
    return f"{amount:.1f} GiB"


def _named(event: Event) -> str:
    known = kinds().get(event.kind)
    return known.name if known else event.kind


def _seen_by_kernel(event: Event) -> list[str]:
    who = process(event.process)
    if event.kind == "process.executed" and event.process:
        return [who, f"runs {command(event.process)}"]
    what = _VERBS.get(event.kind) or event.message or _named(event)
    other = process(event.target) or _file(event.file) or endpoint(event.endpoint)
    return [who, f"{what} {other}".strip()]


def _file(held: File | None) -> str:
    if held is None:
        return ""
    return f"{held.path} -> {held.target}" if held.target else held.path


def _egress(event: Event) -> list[str]:
    verdict = {"blocked": "DENIED", "asked": "asked"}.get(event.disposition, "")
    request = f"{event.http.method} {event.http.path}" if event.http else ""
    status = str(event.http.status) if event.http and event.http.status else ""
    traffic = f"{size(event.bytes_up)} up, {size(event.bytes_down)} down" if event.bytes_up or event.bytes_down else ""
    with_secret = f"with {event.credential}" if event.credential else ""
    return [verdict, endpoint(event.endpoint), request, status, with_secret, traffic, duration(event.duration_ns)]
