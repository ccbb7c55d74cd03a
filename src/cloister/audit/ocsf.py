"""Events as OCSF 1.7.0 (Open Cybersecurity Schema Framework, schema.ocsf.io): for whoever keeps events in that schema.

Class and activity are those of `kinds.toml`. Ours without a place there stand in `unmapped`. Profiles used: *host*
(actor, device), *security_control* (what was decided), *container* (the sandbox of a process). 1.7.0 is pinned because
it is the newest version whose whole schema the tests can check against; its meaning of `metadata.uid` and
`actor.app_name` is the one used here.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cloister.audit import ocsf_objects as objects
from cloister.audit.kept import Kept, severity
from cloister.audit.kinds import Kind, kind_of
from cloister.audit.ocsf_objects import Value, present
from cloister.audit.rendering import Origin, single_line

VERSION = "1.7.0"
_NS_PER_MS = 1_000_000
_OTHER = 99
_SEVERITIES = ("Unknown", "Informational", "Low", "Medium", "High", "Critical")
_DISPOSITIONS = {"allowed": (1, "Allowed", 1, "Allowed"), "blocked": (2, "Denied", 2, "Blocked")}
_LAUNCHES = {"process.executed": (3, "Exec"), "process.forked": (2, "Fork")}


def render(record: Kept, origin: Origin) -> bytes:
    """Return a record as one line of JSON, without its newline."""
    return single_line(msgspec.json.encode(event(record, origin)))


def event(record: Kept, origin: Origin) -> Value:
    """Return a record as an OCSF event."""
    kind = kind_of(record.kind)
    activity = _activity(record, kind)
    grade = severity(record)
    container = present({"uid": record.run, "name": record.agent})
    shared: Value = {
        "category_uid": kind.class_uid // 1000,
        "class_uid": kind.class_uid,
        "activity_id": activity,
        "activity_name": kind.name if activity == _OTHER else None,
        "type_uid": kind.class_uid * 100 + activity,
        "time": record.time // _NS_PER_MS,
        "severity_id": grade,
        "severity": _SEVERITIES[grade],
        "status_id": _status(record),
        "status_code": str(record.error) if record.error else record.reason,
        "message": record.message or kind.name,
        "count": objects.integer(record.count) if record.count != 1 else None,
        "duration": record.duration_ns // _NS_PER_MS or None,
        "device": {"hostname": origin.host or "?", "type_id": 0},
        "actor": objects.actor(record, container, with_process=kind.class_uid != _FINDING),
    }
    body = _BODIES.get(kind.class_uid, _nothing)(record, container)
    control = _control(record)
    profiles = ["host", *(["security_control"] if control else []), *(["container"] if _contained(record) else [])]
    rest = {"metadata": _metadata(record, origin, profiles), "unmapped": _unmapped(record)}
    return present({**shared, **control, **body, **rest})


def _activity(record: Kept, kind: Kind) -> int:
    if kind.class_uid == _HTTP and record.http is not None and record.http.method in objects.METHODS:
        return objects.METHODS.index(record.http.method) + 1
    return kind.activity_id


def _status(record: Kept) -> int:
    """1 success, 2 failure, 0 unknown: a question that is still open."""
    if record.error or record.disposition == "blocked":
        return 2
    return 0 if record.disposition == "asked" else 1


def _metadata(record: Kept, origin: Origin, profiles: list[str]) -> Value:
    return present(
        {
            "version": VERSION,
            "product": {"name": "Cloister", "vendor_name": "Cloister", "version": origin.version},
            "profiles": profiles,
            "uid": f"{origin.log}:{record.seq}" if origin.log else str(record.seq),
            "sequence": record.seq if record.seq <= objects.INTEGER_MAX else None,
            "original_event_uid": _original(record),
            "correlation_uid": record.run,
            "event_code": record.kind,
            "log_name": "cloister-audit",
            "log_provider": record.source,
            "reporter": present({"name": record.source, "uid": _text(record.reporter_uid)}),
        }
    )


def _original(record: Kept) -> str:
    """Return what is the same where one event stands in the log twice; nobody can take another reporter's."""
    return f"{record.reporter_uid}:{record.id}" if record.id and record.reporter_uid is not None else record.id


def _control(record: Kept) -> Value:
    """Return the attributes of the profile *security_control*, where something was decided."""
    if not (record.disposition or record.rule or record.policy):
        return {}
    action, action_name, disposition, name = _DISPOSITIONS.get(record.disposition, (0, "Unknown", 0, "Unknown"))
    return present(
        {
            "action_id": action,
            "action": action_name,
            "disposition_id": disposition,
            "disposition": name,
            "policy": present({"uid": record.policy}),
            "firewall_rule": present({"name": record.rule})
            if kind_of(record.kind).class_uid // 1000 == _NETWORK
            else {},
        }
    )


def _contained(record: Kept) -> bool:
    processes = [one for one in (record.process, record.target) if one is not None]
    return bool(processes) and bool(record.run or record.agent or any(one.namespace_pid for one in processes))


def _unmapped(record: Kept) -> Value:
    """Return what OCSF has no attribute for, so that nothing of a record is lost but the keeper's own words."""
    found = {
        "chain_hash": record.hash,
        "plan": record.plan,
        "rule": record.rule,
        "reason": record.reason,
        "tier": record.tier,
        "credential": record.credential,
        "account": record.account,
        "sequence": record.seq if record.seq > objects.INTEGER_MAX else None,
        "disposition": record.disposition if record.disposition == "asked" else "",
        "truncated": True if record.process is not None and record.process.truncated else None,
        "file": msgspec.to_builtins(record.file) if record.file is not None else None,
        "http_method": record.http.method
        if record.http is not None and record.http.method not in objects.METHODS
        else "",
        "protocol": record.endpoint.protocol if record.endpoint is not None else "",
        "model": msgspec.to_builtins(record.model) if record.model is not None else None,
        "bytes_up": record.bytes_up or None,
        "bytes_down": record.bytes_down or None,
        "details": dict(record.details),
    }
    return present(found)


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


# One function per class: what it has beside the shared attributes.

_FINDING, _HTTP, _NETWORK = 2004, 4002, 4


def _nothing(_record: Kept, _container: Value) -> Value:
    return {}


def _process(record: Kept, container: Value) -> Value:
    """Process Activity: who acted, and on what. A process that starts or ends is its own actor's business."""
    subject = record.target or record.process
    launch, name = _LAUNCHES.get(record.kind, (None, None))
    exit_code = record.details.get("exit_code")
    return {
        "process": objects.process(subject, container) if subject is not None else {"uid": "unknown"},
        "launch_type_id": launch,
        "launch_type": name,
        "exit_code": objects.integer(exit_code) if isinstance(exit_code, int) else None,
    }


def _file(record: Kept, _container: Value) -> Value:
    found = objects.file(record.file) if record.file is not None else {"name": "?", "type_id": 0}
    target = objects.named_file(record.file.target) if record.file is not None and record.file.target else None
    return {"file": found, "file_result": target, "access_mask": _mask(record)}


def _mask(record: Kept) -> int | None:
    return objects.integer(record.file.flags) if record.file is not None and record.file.flags else None


def _kernel(record: Kept, _container: Value) -> Value:
    name = record.details.get("syscall", record.kind)
    return {"kernel": {"name": str(name), "type_id": 2, "type": "System Call", "system_call": str(name)}}


def _endpoints(record: Kept) -> Value:
    """Return source and destination: the sandbox, and the other side; for a bind, what is listened on."""
    here: Value = present({"name": record.agent or "sandbox", "uid": record.run})
    there = objects.network_endpoint(record.endpoint) if record.endpoint is not None else {}
    if record.kind == "network.bound":
        return {"src_endpoint": {**here, **there}}
    return {"src_endpoint": here, "dst_endpoint": there}


def _network(record: Kept, _container: Value) -> Value:
    protocol = record.endpoint.protocol if record.endpoint is not None else ""
    traffic = present({"bytes_out": record.bytes_up or None, "bytes_in": record.bytes_down or None})
    connection = {"direction_id": 2, "direction": "Outbound", "protocol_name": protocol} if protocol else {}
    return {**_endpoints(record), "connection_info": connection, "traffic": traffic, **_http(record)}


def _http(record: Kept) -> Value:
    """Return a request; in the class for connections only its address, in the other one always something."""
    parts = _http_parts(record)
    if kind_of(record.kind).class_uid == _HTTP:
        return {"http_request": {"uid": str(record.seq)}, **parts}
    asked = parts.get("http_request")
    return {"url": asked.get("url")} if isinstance(asked, dict) else {}


def _authentication(record: Kept, _container: Value) -> Value:
    service = record.credential or record.source or "cloister"
    there = objects.network_endpoint(record.endpoint) if record.endpoint is not None else {}
    who = objects.user(record) or {"name": "?"}
    return {"user": who, "service": {"name": service}, "dst_endpoint": there}


def _entity(record: Kept, _container: Value) -> Value:
    if record.kind == "policy.changed":
        policy = present({"uid": record.policy, "name": "policy"})
        return {"entity": {"type_id": 5, "type": "Policy", "name": "policy", "policy": policy}}
    name = record.details.get("step", record.kind)
    return {
        "entity": {"type_id": _OTHER, "type": "Plan step", "name": str(name), "uid": record.plan or record.run or "?"}
    }


def _application(record: Kept, _container: Value) -> Value:
    return {"app": present({"name": record.agent or "cloister", "uid": record.run, "vendor_name": "Cloister"})}


def _api(record: Kept, _container: Value) -> Value:
    model = record.model
    operation = str(record.details.get("operation", record.kind))
    service = model.provider if model is not None else record.source
    call: Value = present(
        {
            "operation": operation,
            "service": present({"name": service}),
            "request": present({"uid": model.request_id}) if model is not None else None,
        }
    )
    resources = [{"name": model.name, "type": "model"}] if model is not None and model.name else []
    return {"api": call, "resources": resources, **_endpoints(record), **_http_parts(record)}


def _http_parts(record: Kept) -> Value:
    if record.http is None:
        return {}
    answer = {"code": record.http.status} if record.http.status else {}
    return present({"http_request": objects.request(record.http, record.endpoint), "http_response": answer})


def _finding(record: Kept, container: Value) -> Value:
    name = record.rule or record.reason or record.kind
    evidence = present(
        {
            "process": objects.process(record.process, container) if record.process is not None else None,
            "file": objects.file(record.file) if record.file is not None else None,
            "dst_endpoint": objects.network_endpoint(record.endpoint) if record.endpoint is not None else None,
        }
    )
    info = {
        "uid": f"{record.run or 'host'}:{record.seq}",
        "title": name,
        "desc": record.message,
        "analytic": {"name": name, "uid": name, "type_id": 1, "type": "Rule"},
    }
    return {"finding_info": present(info), "evidences": [evidence] if evidence else [], "is_alert": True}


def _log(_record: Kept, _container: Value) -> Value:
    return {"log_name": "cloister-audit", "log_provider": "cloister", "log_type_id": 2, "log_type": "Application"}


def _state(_record: Kept, _container: Value) -> Value:
    return {"security_level_id": 2, "security_level": "At Risk"}


_BODIES: dict[int, Callable[[Kept, Value], Value]] = {
    1001: _file,
    1003: _kernel,
    1007: _process,
    1008: _log,
    _FINDING: _finding,
    3002: _authentication,
    3004: _entity,
    4001: _network,
    _HTTP: _network,
    5019: _state,
    6002: _application,
    6003: _api,
}
