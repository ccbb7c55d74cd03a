r"""Events as CEF (ArcSight Common Event Format), version 0 and version 1, one line each.

By *ArcSight CEF Implementation Standard*, document version 27 (OpenText, SmartConnectors 25.1): the header escapes `\`
and `|` and holds no line break; a value of the extension escapes `\`, `=` and line breaks (`\n`, `\r`); a value longer
than its key may hold is cut, which the end `…` shows. Where 0 and 1 differ, by the same document: the number in the
header, and keys that came with 1.2, of which `reportedDuration`, `reportedResourceName` and `reportedResourceType`
are used. An IPv6 address stands in `c6a3` in both, since `dst` is an IPv4 address in both. Everything else that acts
on a terminal or breaks a line stands as its escape (`rendering.visible`).

A receiver tells records by `externalId` (the number in the log) together with `deviceExternalId` (the log).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from cloister.audit.event import Endpoint, Process
from cloister.audit.kept import Kept, severity
from cloister.audit.kinds import kind_of
from cloister.audit.ocsf_objects import command_line, is_address
from cloister.audit.rendering import Origin, visible

Version = Literal[0, 1]
_NS_PER_MS = 1_000_000
_GRADES = (0, 2, 4, 6, 8, 10)
"""OCSF severity_id 1 to 5 as 0 to 10: 0-3 is low, 4-6 medium, 7-8 high, 9-10 very high."""
_SHORT = {"act": 63, "app": 31, "proto": 31, "outcome": 63, "externalId": 40, "deviceExternalId": 255, "dvchost": 100}
_LONG = {"cs1": 4000, "cs2": 4000, "cs3": 4000, "cs4": 4000, "cs5": 4000, "cs6": 4000}
_NEWER = {"reportedResourceName": 64, "reportedResourceType": 64, "reportedDuration": 20}
_LENGTHS = {**_SHORT, **_LONG, **_NEWER}
_LENGTH = 1023
_KEY = re.compile(r"[A-Za-z0-9_]+")
_IN_HEADER = str.maketrans({"\\": "\\\\", "|": "\\|"})
_IN_VALUE = str.maketrans({"\\": "\\\\", "=": "\\=", "\n": "\\n", "\r": "\\r"})
_BREAKS = re.compile(r"([\r\n])")
_SPECIAL = re.compile(r"[\\=\r\n]")
_OUTCOMES = {"allowed": "success", "blocked": "failure"}

Field = tuple[str, str | int | float | None]


def render(record: Kept, origin: Origin, version: Version = 0) -> bytes:
    """Return a record as one line, without its newline."""
    kind = kind_of(record.kind)
    head = ("Cloister", "Cloister", origin.version, record.kind, kind.name, str(_GRADES[severity(record)]))
    cuts = (63, 63, 31, 1023, 512, 10)
    header = "|".join(_header(text[:cut]) for text, cut in zip(head, cuts, strict=True))
    extension = " ".join(_pairs(_fields(record, origin, version)))
    return f"CEF:{version}|{header}|{extension}".encode()


def _header(text: str) -> str:
    return visible(text).translate(_IN_HEADER)


def _pairs(fields: Iterable[Field]) -> Iterator[str]:
    """Yield what is there, each key once: of two with one name the first stands."""
    seen = set()
    for key, value in fields:
        if value is None or value == "" or key in seen:
            continue
        seen.add(key)
        yield f"{key}={_value(str(value), _LENGTHS.get(key, _LENGTH))}"


def _value(text: str, longest: int) -> str:
    """Return a value: line breaks as CEF writes them, other signs that act as our escapes; cut where it is too long.

    Spaces at its end would be lost, or belong to the next key: the last one is written as its escape.
    """
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    if not text.isprintable():
        text = "".join(part if part in ("\r", "\n") else visible(part) for part in _BREAKS.split(text))
    if text.endswith(" "):
        text = text[:-1] + "\\x20"
    if text.startswith(" "):
        text = "\\x20" + text[1:]
    return text.translate(_IN_VALUE) if _SPECIAL.search(text) else text


def _fields(record: Kept, origin: Origin, version: Version) -> Iterator[Field]:
    yield "rt", record.time // _NS_PER_MS
    yield "externalId", record.seq
    yield "deviceExternalId", origin.log
    yield "dvchost", origin.host
    yield "cat", record.kind.partition(".")[0]
    yield "act", record.disposition
    yield "outcome", _outcome(record)
    yield "reason", record.reason or (str(record.error) if record.error else "")
    yield "msg", record.message
    yield "suser", record.user
    yield "duser", record.account
    yield "cnt", record.count if record.count != 1 else None
    yield from _process(record.process, "s")
    yield from _process(record.target, "d")
    if record.process is not None:
        yield "suid", record.process.user_id
    yield from _endpoint(record.endpoint)
    yield from _file(record)
    yield from _http(record)
    yield "out", record.bytes_up or None
    yield "in", record.bytes_down or None
    yield "sourceServiceName", record.source
    yield from _custom(record)
    if version == 1:
        yield "reportedDuration", record.duration_ns // _NS_PER_MS or None
        yield "reportedResourceName", record.model.name if record.model is not None else ""
        yield "reportedResourceType", "model" if record.model is not None else ""
    yield from _own(record)


def _outcome(record: Kept) -> str:
    if record.error:
        return "failure"
    return _OUTCOMES.get(record.disposition, "" if record.disposition else "success")


def _process(process: Process | None, side: Literal["s", "d"]) -> Iterator[Field]:
    """Yield the process that acted as the source, and the one that something was done to as the destination."""
    if process is None:
        return
    yield f"{side}pid", process.pid
    yield f"{side}proc", process.path or process.name
    if side == "s":
        yield "fileHash", process.hash


def _endpoint(endpoint: Endpoint | None) -> Iterator[Field]:
    if endpoint is None:
        return
    if ":" in endpoint.ip and is_address(endpoint.ip):
        yield "c6a3", endpoint.ip
        yield "c6a3Label", "Destination IPv6 Address"
    elif is_address(endpoint.ip):
        yield "dst", endpoint.ip
    yield "dhost", endpoint.hostname or endpoint.path or endpoint.ip
    yield "dpt", endpoint.port or None
    lower = endpoint.protocol in ("tcp", "udp", "unix")
    yield ("proto" if lower else "app"), endpoint.protocol


def _file(record: Kept) -> Iterator[Field]:
    """Yield the file that a thing was done to; of a rename, the old name is the old file's."""
    if record.file is None:
        return
    if record.file.target:
        yield "filePath", record.file.target
        yield "fname", posixpath.basename(record.file.target)
        yield "oldFilePath", record.file.path
    else:
        yield "filePath", record.file.path
        yield "fname", posixpath.basename(record.file.path)


def _http(record: Kept) -> Iterator[Field]:
    if record.http is not None:
        yield "requestMethod", record.http.method
        yield "request", record.http.path


def _custom(record: Kept) -> Iterator[Field]:
    """Yield the slots for what CEF has no key for; which is which is said beside each (`cs1Label`)."""
    process = record.process
    slots: tuple[Field, ...] = (
        ("run", record.run),
        ("agent", record.agent),
        ("rule", record.rule),
        ("commandLine", command_line(process.cmd_line) if process is not None else ""),
        ("processUid", process.uid if process is not None else ""),
        ("parentProcessUid", process.parent_uid if process is not None else ""),
    )
    for number, (label, value) in enumerate(slots, 1):
        if value:
            yield f"cs{number}", value
            yield f"cs{number}Label", label
    numbers: tuple[Field, ...] = (
        ("namespacePid", process.namespace_pid if process is not None else 0),
        ("tokens", record.model.tokens if record.model is not None else 0),
        ("httpStatus", record.http.status if record.http is not None else 0),
    )
    for number, (label, amount) in enumerate(numbers, 1):
        if amount:
            yield f"cn{number}", amount
            yield f"cn{number}Label", label
    if record.model is not None:
        yield "cfp1", record.model.cost_usd or None
        yield "cfp1Label", "costUsd" if record.model.cost_usd else ""


def _own(record: Kept) -> Iterator[Field]:
    """Yield what is left, under keys of our own (`CloisterCloister…`, the form that the document asks for)."""
    yield "CloisterCloisterHash", record.hash
    yield "CloisterCloisterId", record.id
    yield "CloisterCloisterPolicy", record.policy
    yield "CloisterCloisterPlan", record.plan
    yield "CloisterCloisterTier", record.tier
    yield "CloisterCloisterCredential", record.credential
    if record.process is not None:
        yield "CloisterCloisterCwd", record.process.cwd
    if record.model is not None:
        yield "CloisterCloisterModel", f"{record.model.provider}/{record.model.name}"
    for name, value in record.details.items():
        words = "".join(part[:1].upper() + part[1:] for part in _KEY.findall(name)).replace("_", "")
        if words:
            yield f"CloisterCloister{words[:64]}", str(value)
