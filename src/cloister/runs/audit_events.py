"""What the parts of a run say, as events of the audit: one function per thing that is told.

Pure conversion: values in, events out. Doors call it in a thread of their own (`audit_door`), so nothing here may reach
back into a run that lives. Texts that agents choose are cut, never dropped.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cloister.audit.event import Disposition, Endpoint, Event, Http, Model, Process
from cloister.plan.steps import Launch, Limit, Listen, ListenAgent, MakeDirectory, Placeholders, Plan

if TYPE_CHECKING:
    from cloister.llm.ledger import Row
    from cloister.runs.audit_door import About
    from cloister.runs.store import Record

LONGEST = 2048
"""Characters of one text."""
_WORDS = 64
"""Words of a command."""
_VERDICTS: dict[str, Disposition] = {"allow": "allowed", "deny": "blocked", "ask": "asked", "failed": ""}
_NS = 1_000_000_000
_UNDONE = (Launch, Limit, Listen, ListenAgent, MakeDirectory, Placeholders)
"""Steps that the end of a run takes back by themselves; files go with their directories (`host/apply.py`)."""


def _event(about: About, time_s: float, kind: str, **fields: Any) -> Event:
    """Return an event of a run; `time_s` in seconds since the epoch."""
    return Event(
        time=int(time_s * _NS), kind=kind, run=about.run, agent=cut(about.agent), user=about.user,
        account=about.account, source=about.source, **fields,
    )  # fmt: skip


def started(about: About, time_s: float, plan: Plan, record: Record) -> Iterator[Event]:
    """A run begins: its plan is stored, and the steps before the launch are done."""
    details: dict[str, str | int | float | bool] = {
        "workspace": cut(plan.workspace), "isolation": plan.isolation, "preset": plan.preset, "mode": record.mode,
        "detached": record.detached, "project": cut(plan.project),
    }  # fmt: skip
    if vm := plan.launch.vm:
        details |= {"image": f"{vm.image} {vm.version}", "manifest": vm.manifest, "monitor": vm.monitor}
    for number, opt_out in enumerate(plan.opt_outs):
        details[f"opt_out_{number}"] = cut(opt_out)
    yield _event(
        about, time_s, "run.started", policy=plan.policy_digest, plan=plan.digest(), message=_command(plan.asked),
        process=Process(pid=record.client_pid, cmd_line=tuple(map(cut, plan.asked[:_WORDS])), cwd=cut(plan.workspace)),
        details=details,
    )  # fmt: skip
    for step in plan.steps:
        yield _event(about, time_s, "step.applied", message=cut(step.describe()))


def ended(about: About, time_s: float, plan: Plan, result: Mapping[str, Any]) -> Iterator[Event]:
    """A run is over, undone and has its receipt; `result` are its numbers."""
    for step in reversed(plan.steps):
        if isinstance(step, _UNDONE) and not (isinstance(step, MakeDirectory) and step.kept):
            yield _event(about, time_s, "step.undone", message=cut(step.describe()))
    said = dict(result)
    yield _event(
        about, time_s, "run.ended", policy=plan.policy_digest, plan=plan.digest(), reason=said.pop("reason"),
        bytes_up=said.pop("bytes_up"), bytes_down=said.pop("bytes_down"), duration_ns=said.pop("duration_ns"),
        details=said,
    )  # fmt: skip


def refused(about: About, time_s: float, reference: str, message: str) -> Iterator[Event]:
    """A run was asked for and is not started."""
    yield _event(about, time_s, "run.refused", disposition="blocked", reason=reference, message=cut(message))


def policy_changed(about: About, time_s: float, digest: str, before: str, how: str) -> Iterator[Event]:
    """Another policy is in force from here on."""
    details = {"before": before} if before else {}
    yield _event(about, time_s, "policy.changed", policy=digest, message=how, details=details)


def model_called(about: About, row: Row) -> Iterator[Event]:
    """A call of a model ended, or was refused."""
    tokens = row.input_tokens + row.cache_read_tokens + row.cache_write_5m_tokens + row.cache_write_1h_tokens
    refusal = row.outcome == "refused"
    yield _event(
        about, row.time, "model.called", disposition="blocked" if refusal else "allowed", reason=cut(row.reason),
        model=Model(
            provider=row.provider, name=cut(row.model), tokens=tokens + row.output_tokens, cost_usd=row.cost_usd,
            request_id=cut(row.request_id),
        ),
        http=Http(method="POST", path=row.route, status=row.status),
        duration_ns=int(row.duration_s * _NS),
        details={"call": row.id, "outcome": row.outcome, "output_tokens": row.output_tokens, "attempts": row.attempts},
    )  # fmt: skip


def of_run(about: About, time_s: float, kind: str, fields: Mapping[str, Any]) -> Iterator[Event]:
    """Return what a line of a run's own events file is in the audit (`ActiveRun.write_event`)."""
    match kind:
        case "egress":
            yield from _egress(about, fields)
        case "signing":
            yield _signing(about, time_s, fields)
        case "executed" | "connected":
            yield _noticed(about, kind, fields)
        case "notices-lost":
            yield _event(
                about, time_s, "log.lost", severity_id=4, count=fields["count"], tier="seccomp",
                message="launched programs and connections that came faster than they are recorded",
            )  # fmt: skip
        case "identity-issued":
            audience = cut(str(fields.get("audience", "")))
            yield _event(about, time_s, "identity.issued", message=f"for {audience}", details=_flat(fields))
        case "policy-reloaded":
            yield from policy_changed(about, time_s, str(fields.get("digest", "")), "", "brought to a living run")
        case "credentials-revoked":
            yield _event(about, time_s, "policy.changed", message="credentials were taken back", details=_flat(fields))
        case "warning":
            yield _event(about, time_s, "run.warned", severity_id=2, message=cut(str(fields.get("what", ""))))
        case _:
            yield _event(about, time_s, "run.warned", message=kind, details=_flat(fields))


def _egress(about: About, fields: Mapping[str, Any]) -> Iterator[Event]:
    time_s, method = fields["time"], fields.get("method", "")
    endpoint = Endpoint(
        hostname=cut(fields["host"]), ip=fields.get("address", ""), port=fields["port"], protocol=fields["protocol"]
    )
    verdict = _VERDICTS.get(fields["verdict"], "")
    http = Http(method=cut(method), path=cut(fields.get("path", "")), status=fields.get("status", 0))
    via = {"via": fields["via"]} if fields.get("via") else {}
    yield _event(
        about, time_s, "egress.request" if method else "egress.decided", disposition=verdict,
        rule=cut(fields.get("rule", "")), reason=fields["reason"], endpoint=endpoint, http=http if method else None,
        bytes_up=fields.get("bytes_up", 0), bytes_down=fields.get("bytes_down", 0),
        duration_ns=int(fields.get("duration_s", 0.0) * _NS), details=via,
    )  # fmt: skip
    for name in fields.get("credentials", ()):
        yield _event(about, time_s, "credential.used", credential=name, endpoint=endpoint, disposition="allowed")


def _noticed(about: About, kind: str, fields: Mapping[str, Any]) -> Event:
    """What seccomp's user notification told: ids of processes are those inside."""
    endpoint = None
    if kind == "connected":
        named, protocol = fields.get("socket", ""), "unix" if "socket" in fields else ""
        endpoint = Endpoint(ip=fields.get("ip", ""), port=fields.get("port", 0), path=cut(named), protocol=protocol)
    words = tuple(map(cut, fields.get("words", ())))
    return _event(
        about, fields["time"], "network.connected" if endpoint else "process.executed", tier="seccomp",
        process=Process(
            pid=0, namespace_pid=fields["pid"], name=cut(fields["name"]), path=cut(fields["path"]), cmd_line=words,
            cwd=cut(fields.get("directory", "")), hash=fields.get("hash", ""),
        ),
        endpoint=endpoint, details={"parent_namespace_pid": fields["parent"]},
    )  # fmt: skip


def _signing(about: About, time_s: float, fields: Mapping[str, Any]) -> Event:
    host = cut(fields.get("host", ""))
    details = {name: cut(str(fields[name])) for name in ("use", "key", "user") if fields.get(name)}
    return _event(
        about, time_s, "signing.used", disposition=_VERDICTS.get(fields["verdict"], ""), reason=fields["reason"],
        credential=fields.get("credential", ""), endpoint=Endpoint(hostname=host) if host else None,
        message=cut(fields.get("explanation", "")), details=details,
    )  # fmt: skip


def _flat(fields: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return details without a depth."""
    return {
        name: value if isinstance(value, int | float | bool) else cut(_text(value)) for name, value in fields.items()
    }


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _command(words: tuple[str, ...]) -> str:
    return cut(shlex.join(words[:_WORDS]))


def cut(text: str) -> str:
    """Return a text of bounded length that UTF-8 can hold; lone surrogates stand as their escapes."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return short if short.isascii() else short.encode("utf-8", "backslashreplace").decode()


def lost(source: str, time_s: float, count: int, why: str) -> Iterator[Event]:
    """Say how many things could not be told."""
    yield Event(time=int(time_s * _NS), kind="log.lost", severity_id=4, count=count, message=cut(why), source=source)
