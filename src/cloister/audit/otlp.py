"""Events as logs of OpenTelemetry: one request of OTLP/HTTP with JSON (opentelemetry.io/docs/specs/otlp, 1.x).

The JSON encoding of its protobuf messages: names in lowerCamelCase, 64-bit integers as decimal strings, no null. Names
of attributes are OpenTelemetry's semantic conventions where they have one, else `cloister.*`. A receiver tells records
by `cloister.seq` together with `cloister.log.id` of the resource. No trace ids: a run is not a trace.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cloister.audit.event import Process
from cloister.audit.kept import Kept, severity
from cloister.audit.kinds import kind_of
from cloister.audit.ocsf_objects import is_address
from cloister.audit.rendering import Origin, single_line

Scalar = str | int | float | bool | tuple[str, ...] | None
_NUMBERS = (9, 9, 10, 13, 17, 21)
"""SeverityNumber by OCSF severity_id: INFO, INFO2, WARN, ERROR, FATAL (logs data model, "Field: SeverityNumber")."""
_NAMES = ("INFO", "INFO", "INFO2", "WARN", "ERROR", "FATAL")
_INT64_MAX = 2**63 - 1


def request(records: Iterable[Kept], origin: Origin) -> bytes:
    """Return an ExportLogsServiceRequest, for `POST /v1/logs` with `Content-Type: application/json`; one line."""
    resource = _attributes(
        {
            "service.name": "cloister",
            "service.version": origin.version,
            "host.name": origin.host,
            "os.type": "linux",
            "cloister.log.id": origin.log,
        }
    )
    scope = {"scope": {"name": "cloister.audit"}, "logRecords": [log_record(record) for record in records]}
    body = {"resourceLogs": [{"resource": {"attributes": resource}, "scopeLogs": [scope]}]}
    return single_line(msgspec.json.encode(body))


def log_record(record: Kept) -> dict[str, object]:
    """Return one LogRecord."""
    grade = severity(record)
    kind = kind_of(record.kind)
    return {
        "timeUnixNano": str(max(0, record.time)),
        "observedTimeUnixNano": str(max(0, record.time)),
        "severityNumber": _NUMBERS[grade],
        "severityText": _NAMES[grade],
        "eventName": f"cloister.{record.kind}",
        "body": {"stringValue": record.message or kind.name},
        "attributes": _attributes({**_who(record), **_what(record), **_process(record.process), **_rest(record)}),
    }


def _who(record: Kept) -> dict[str, Scalar]:
    return {
        "cloister.seq": record.seq,
        "cloister.hash": record.hash,
        "cloister.id": record.id,
        "cloister.run.id": record.run,
        "cloister.agent": record.agent,
        "cloister.account": record.account,
        "cloister.policy": record.policy,
        "cloister.plan": record.plan,
        "cloister.source": record.source,
        "cloister.reporter.uid": record.reporter_uid,
        "cloister.tier": record.tier,
        "user.name": record.user,
    }


def _what(record: Kept) -> dict[str, Scalar]:
    kind = kind_of(record.kind)
    return {
        "cloister.ocsf.class_uid": kind.class_uid,
        "cloister.ocsf.activity_id": kind.activity_id,
        "cloister.disposition": record.disposition,
        "cloister.rule": record.rule,
        "cloister.reason": record.reason,
        "cloister.credential": record.credential,
        "cloister.bytes.up": record.bytes_up or None,
        "cloister.bytes.down": record.bytes_down or None,
        "cloister.duration_ns": record.duration_ns or None,
        "cloister.count": record.count if record.count != 1 else None,
        "error.type": str(record.error) if record.error else "",
        **{f"cloister.details.{name}": value for name, value in record.details.items()},
    }


def _process(process: Process | None, prefix: str = "process") -> dict[str, Scalar]:
    if process is None:
        return {}
    return {
        f"{prefix}.pid": process.pid,
        f"{prefix}.vpid": process.namespace_pid or None,
        f"{prefix}.parent_pid": process.parent_pid or None,
        f"{prefix}.command": process.name,
        f"{prefix}.executable.path": process.path,
        f"{prefix}.command_args": process.cmd_line,
        f"{prefix}.working_directory": process.cwd,
        f"{prefix}.user.id": process.user_id,
        f"cloister.{prefix}.uid": process.uid,
        f"cloister.{prefix}.parent_uid": process.parent_uid,
        f"cloister.{prefix}.executable.sha256": process.hash,
        f"cloister.{prefix}.truncated": process.truncated or None,
    }


def _rest(record: Kept) -> dict[str, Scalar]:
    found = _process(record.target, "cloister.target")
    if record.file is not None:
        found |= {
            "file.path": record.file.path,
            "cloister.file.target": record.file.target,
            "cloister.file.resolved": record.file.resolved or None,
            "cloister.file.flags": record.file.flags or None,
        }
    if (endpoint := record.endpoint) is not None:
        found |= {
            "server.address": endpoint.hostname or endpoint.ip or endpoint.path,
            "server.port": endpoint.port or None,
            "network.peer.address": endpoint.ip if is_address(endpoint.ip) else "",
            "network.protocol.name": endpoint.protocol,
        }
    if record.http is not None:
        found |= {
            "http.request.method": record.http.method,
            "url.path": record.http.path,
            "http.response.status_code": record.http.status or None,
        }
    if (model := record.model) is not None:
        found |= {
            "gen_ai.provider.name": model.provider,
            "gen_ai.request.model": model.name,
            "gen_ai.response.id": model.request_id,
            "cloister.model.tokens": model.tokens or None,
            "cloister.model.cost_usd": model.cost_usd or None,
        }
    return found


def _attributes(values: dict[str, Scalar]) -> list[dict[str, object]]:
    """Return KeyValues of what is there; each key once, as the data model demands."""
    there = ((key, value) for key, value in values.items() if value is not None and value not in ("", ()))
    return [{"key": key, "value": _any(value)} for key, value in there]


def _any(value: str | float | bool | tuple[str, ...]) -> dict[str, object]:
    """Return an AnyValue; a number beyond 64 bits stands as text."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if -_INT64_MAX <= value <= _INT64_MAX else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, tuple):
        return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}
    return {"stringValue": value}
