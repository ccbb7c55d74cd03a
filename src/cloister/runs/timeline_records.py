"""Events of a run from its own records, where no log of the audit has it: begin, end, and its `events.jsonl`.

What only a keeper has is missing: what the kernel saw, and model calls, which are in the ledger. Whoever may write the
records can change them; they bear no hash.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloister.audit.event import Event
from cloister.runs import audit_events
from cloister.runs.audit_door import About
from cloister.runs.store import Store

_NS = 1_000_000_000


def events_of(store: Store, run: str, user: str) -> Iterator[Event]:
    """Yield what the records of a run say, in the words of the audit."""
    record, plan, receipt = store.record(run), store.plan(run), store.receipt(run)
    if record is None or plan is None:
        return
    about = About(run, record.agent, user, source="records")
    yield from audit_events.started(about, record.started, plan, record)
    for line in store.events(run):
        fields = {name: value for name, value in line.items() if name not in {"event", "time"}}
        moment = float(line.get("time", record.started))
        kind = str(line.get("event", ""))
        try:
            yield from audit_events.of_run(about, moment, kind, line if kind == "egress" else fields)
        except (KeyError, TypeError, ValueError):
            continue  # a line of an older version that lacks what newer ones have
    if receipt:
        result = {
            "reason": receipt.reason, "bytes_up": receipt.bytes_up, "bytes_down": receipt.bytes_down,
            "duration_ns": int((receipt.finished - receipt.started) * _NS), "exit_code": receipt.exit_code,
            "connections": receipt.connections, "denials": receipt.denials, "warnings": len(receipt.warnings),
        }  # fmt: skip
        yield from audit_events.ended(about, receipt.finished, plan, result)
