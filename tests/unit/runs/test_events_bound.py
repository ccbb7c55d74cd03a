"""Events of a run have a bound: what an agent is denied does not fill the disk."""

import json
import time
from pathlib import Path
from unittest.mock import Mock

from cloister.plan.steps import Launch, Plan
from cloister.runs.active import MAX_EVENT_BYTES, ActiveRun
from cloister.runs.store import Record, Store

RUN = "0123456789ab"


def begun(folder: Path) -> tuple[ActiveRun, Store]:
    """Return a run that is on record."""
    launch = Launch(argv=("bwrap",), command=("agent",), directory="/w", environment={})
    plan = Plan(
        run=RUN, agent="a", preset="", isolation="namespace", workspace="/w", policy_digest="d", steps=(launch,)
    )
    record = Record(
        id=RUN, agent="a", workspace="/w", command=("agent",), status="starting", started=time.time(), broker_pid=1
    )
    store = Store(str(folder))
    store.create(plan, record)
    run = ActiveRun(plan, record, store, (Mock(), Mock()), Mock(), Mock(), {})
    return run, store


def test_events_stop_at_their_bound_and_say_so(tmp_path: Path) -> None:
    """Up to the bound every event is kept whole; then one line tells of the cut, and nothing follows."""
    run, store = begun(tmp_path)
    reason = "x" * (1 << 20)
    for number in range(2 * (MAX_EVENT_BYTES >> 20)):
        run.write_event("egress", {"number": number, "reason": reason})

    lines = [json.loads(line) for line in Path(store.events_path(RUN)).read_bytes().splitlines()]
    assert Path(store.events_path(RUN)).stat().st_size < MAX_EVENT_BYTES + 2 * len(reason)
    assert [line["number"] for line in lines[:-1]] == list(range(len(lines) - 1))
    assert len(lines) > MAX_EVENT_BYTES // len(reason) - 1
    assert lines[-1]["event"] == "cut"


def test_a_gateway_keeps_its_newest_events(tmp_path: Path) -> None:
    """It runs for months: at the bound another file begins, one before it is kept, and the last event is there."""
    run, store = begun(tmp_path)
    run.endless = True
    reason = "x" * (1 << 20)
    for number in range(3 * (MAX_EVENT_BYTES >> 20)):
        run.write_event("egress", {"number": number, "reason": reason})
    kept = [Path(path) for path in (store.earlier_events_path(RUN), store.events_path(RUN))]
    numbers = [json.loads(line)["number"] for path in kept for line in path.read_bytes().splitlines()]
    assert numbers == list(range(numbers[0], 3 * (MAX_EVENT_BYTES >> 20)))
    assert all(path.stat().st_size < MAX_EVENT_BYTES + 2 * len(reason) for path in kept)
