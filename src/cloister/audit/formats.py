"""The formats of an export by their names in the policy and on the command line, each as lines.

`json` is the line of the log itself, byte for byte: with it a receiver can verify the chain on its own.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from cloister.audit import cef, ocsf, otlp, syslog
from cloister.audit.kept import Kept
from cloister.audit.rendering import Origin, single_line

Format = Literal["json", "ocsf", "cef", "cef1"]
"""What a syslog message can hold."""
Lines = Literal["json", "ocsf", "cef", "cef1", "syslog", "otlp"]
"""What `cloister audit export` can print."""
FORMATS: tuple[Format, ...] = get_args(Format)
LINES: tuple[Lines, ...] = get_args(Lines)


def renderer(name: Format, record: Kept, raw: bytes) -> syslog.Render:
    """Return what renders this record and shortened ones of it; `json` of the whole one is its line."""
    if name == "json":
        return lambda shown, origin: raw if shown is record else _json(shown, origin)
    return _RENDERERS[name]


def line(name: Lines, record: Kept, raw: bytes, origin: Origin) -> bytes:
    """Return a record as one line of a format, without its newline."""
    if name == "json":
        return raw
    if name == "otlp":
        return otlp.request((record,), origin)
    if name == "syslog":
        return syslog.message(record, origin, cef.render)
    return _RENDERERS[name](record, origin)


def _json(record: Kept, _origin: Origin) -> bytes:
    return single_line(msgspec.json.encode(record))


def _cef1(record: Kept, origin: Origin) -> bytes:
    return cef.render(record, origin, 1)


_RENDERERS: dict[str, syslog.Render] = {"json": _json, "ocsf": ocsf.render, "cef": cef.render, "cef1": _cef1}
