r"""Messages of syslog (RFC 5424) around a rendered event, and how they are framed (RFC 6587, 5425, 5426).

    <110>1 2026-09-21T14:13:20.123456Z box cloister - file.opened [origin …][meta sequenceId="7"] CEF:0|…

Facility 13, *log audit*. Structured data has the two elements of RFC 5424 that need no enterprise number; everything
else is in the message. No byte order mark: receivers of CEF and JSON look for them at the beginning.

Receivers cut a long message, and one that counts octets may take the rest for a message of its own: an agent that
chooses long names could then write lines there. So nothing longer than `MAX_OCTETS` is sent; texts of the event are
shortened until it fits (`fitting`), and what was cut is in the log itself.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable

import msgspec

from cloister.audit.kept import Kept, severity
from cloister.audit.rendering import Origin, visible

MAX_OCTETS = 8000
"""RFC 5425 asks receivers to take 8192; rsyslog's default is 8192 with what it puts before a message."""
MAX_UDP_OCTETS = 2048
"""RFC 5426, section 3.2: what receivers should take; more would be cut or lost."""
_FACILITY = 13
_LEVELS = (6, 6, 5, 4, 3, 2)
"""Level by OCSF severity_id: informational, notice, warning, error, critical."""
_SEQUENCE_MAX = 2**31 - 1
"""RFC 5424, section 7.3.1: after it comes 1 again."""
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "]": "\\]"})
_LIMITS = (4096, 1024, 512, 256, 128, 64)
_NS_PER_S = 1_000_000_000

Render = Callable[[Kept, Origin], bytes]


def message(record: Kept, origin: Origin, render: Render, *, octets: int = MAX_OCTETS) -> bytes:
    """Return one syslog message of at most so many octets, unframed."""
    head = _header(record, origin)
    return head + fitting(record, origin, render, octets - len(head))


def octet_counted(text: bytes) -> bytes:
    """Return a message as it is sent over TCP and TLS (RFC 6587, section 3.4.1; RFC 5425, section 4.3)."""
    return b"%d %b" % (len(text), text)


def fitting(record: Kept, origin: Origin, render: Render, octets: int) -> bytes:
    """Return a rendering that is not longer than this: whole where it fits, else with its texts cut ever shorter."""
    rendered = render(record, origin)
    for limit in _LIMITS:
        if len(rendered) <= octets:
            return rendered
        rendered = render(shortened(record, limit), origin)
    return rendered if len(rendered) <= octets else render(_bare(record), origin)


def shortened(record: Kept, limit: int) -> Kept:
    """Return a record none of whose texts is longer than this, lists of arguments included; a cut one ends in `…`."""
    values = msgspec.to_builtins(record)
    return msgspec.convert(_cut(values, limit), Kept)


def _cut(value: object, limit: int) -> object:
    if isinstance(value, str):
        return value if len(value) <= limit else value[: limit - 1] + "…"
    if isinstance(value, dict):
        return {_cut(key, limit): _cut(inner, limit) for key, inner in list(value.items())[:limit]}
    if isinstance(value, list | tuple):
        kept = [_cut(inner, limit) for inner in value[: max(1, limit // 16)]]
        return [*kept, "…"] if len(kept) < len(value) else kept
    return value


def _bare(record: Kept) -> Kept:
    """Return what always fits: when, what, whose, and where the whole of it stands."""
    return Kept(
        seq=record.seq,
        hash=record.hash[:64],
        time=record.time,
        kind=record.kind[:64],
        severity_id=record.severity_id,
        disposition=record.disposition,
        run=record.run[:64],
        agent=record.agent[:64],
        message="too long to be sent; the log has it",
    )


def _header(record: Kept, origin: Origin) -> bytes:
    level = _FACILITY * 8 + _LEVELS[severity(record)]
    meta = _element("meta", {"sequenceId": str((record.seq - 1) % _SEQUENCE_MAX + 1)})
    host, data = _of_origin(origin)
    kind, data = _name(record.kind, 32), data + meta
    return f"<{level}>1 {timestamp(record.time)} {host} cloister - {kind} {data} ".encode()


@functools.lru_cache(maxsize=8)
def _of_origin(origin: Origin) -> tuple[str, str]:
    """Return what the header of every message from one log says: the host, and the first element."""
    return _name(origin.host, 255), _element("origin", {"software": "cloister", "swVersion": origin.version[:32]})


def _element(name: str, values: dict[str, str]) -> str:
    """Return one SD-ELEMENT (RFC 5424, section 6.3)."""
    return f"[{name}{''.join(f' {key}={parameter(value)}' for key, value in values.items())}]"


def parameter(value: str) -> str:
    r"""Return the value of an SD-PARAM in its quotes: `"`, `\` and `]` are escaped (RFC 5424, section 6.3.3)."""
    return f'"{visible(value).translate(_ESCAPES)}"'


def _name(text: str, longest: int) -> str:
    """Return a field of the header: visible ASCII, or `-` where there is none (RFC 5424, section 6)."""
    return "".join(sign if "!" <= sign <= "~" else "?" for sign in text[:longest]) or "-"


def timestamp(time_ns: int) -> str:
    """Return a time in UTC with microseconds (RFC 3339, as RFC 5424, section 6.2.3, asks); `-` for one beyond years."""
    seconds, rest = divmod(time_ns, _NS_PER_S)
    try:
        when = dt.datetime.fromtimestamp(seconds, tz=dt.UTC)
    except (ValueError, OverflowError, OSError):
        return "-"
    return f"{when:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def journal_entry(record: Kept, origin: Origin, render: Render) -> bytes:
    """Return one datagram of the journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

    Every value is sent with its length, so that no text can become a field of its own.
    """
    fields = {
        "MESSAGE": fitting(record, origin, render, MAX_OCTETS),
        "PRIORITY": str(_LEVELS[severity(record)]).encode(),
        "SYSLOG_FACILITY": str(_FACILITY).encode(),
        "SYSLOG_IDENTIFIER": b"cloister",
        "CLOISTER_SEQ": str(record.seq).encode(),
        "CLOISTER_KIND": visible(record.kind).encode(),
        "CLOISTER_RUN": visible(record.run[:_FIELD_MAX]).encode(),
        "CLOISTER_AGENT": visible(record.agent[:_FIELD_MAX]).encode(),
    }
    return b"".join(
        b"%b\n%b%b\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
        for name, value in fields.items()
        if value
    )


def dev_log_line(record: Kept, origin: Origin, render: Render) -> bytes:
    """Return one datagram for /dev/log, as syslog(3) writes it but for the time, which its reader knows."""
    head = f"<{_FACILITY * 8 + _LEVELS[severity(record)]}>cloister: ".encode()
    return head + fitting(record, origin, render, MAX_UDP_OCTETS - len(head))


_FIELD_MAX = 256
