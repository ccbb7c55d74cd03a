"""The run store: what is written survives, what is half written is not believed."""

from pathlib import Path

import msgspec
import pytest

from cloister.errors import UsageError
from cloister.plan.steps import Launch, Plan
from cloister.runs.store import Record, Store, is_id, new_id

RUN = "0123456789ab"


def _plan(run: str = RUN) -> Plan:
    launch = Launch(argv=("bwrap",), command=("agent",), directory="/w", environment={"A": "b"})
    return Plan(
        run=run, agent="a", preset="", isolation="namespace", workspace="/w", policy_digest="d", steps=(launch,)
    )


def _record(run: str = RUN, **changes: object) -> Record:
    record = Record(id=run, agent="a", workspace="/w", command=("agent",), status="starting", started=1.0, broker_pid=1)
    return msgspec.structs.replace(record, **changes)


def test_ids_sort_by_time() -> None:
    """A later run has a later id, also within one second; all are well formed."""
    ids = [new_id(1_700_000_000 + index / 500) for index in range(2000)]

    assert ids == sorted(ids)
    assert all(is_id(one) for one in ids)
    assert len({new_id(1.0) for _ in range(200)}) > 150


@pytest.mark.parametrize(
    "text", ["", "last", "../../etc", "0123456789a", "0123456789abc", "0123456789aU", "0123456789a\n"]
)
def test_what_is_no_id_names_no_path(tmp_path: Path, text: str) -> None:
    """A name with a slash, a newline or another length never becomes part of a path."""
    assert not is_id(text)
    with pytest.raises(UsageError):
        Store(str(tmp_path)).record(text)


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    """The stored plan is equal to the one that was stored, so that it can be undone from the file alone."""
    store = Store(str(tmp_path / "runs"))
    store.create(_plan(), _record())

    assert store.plan(RUN) == _plan()
    assert store.record(RUN) == _record()
    assert store.ids() == [RUN]


def test_a_half_written_file_is_no_file(tmp_path: Path) -> None:
    """A crash in the middle of a write leaves the old value, or none."""
    store = Store(str(tmp_path / "runs"))
    store.create(_plan(), _record())
    (tmp_path / "runs" / RUN / "plan.json").write_text('{"run":')

    assert store.plan(RUN) is None
    assert store.receipt(RUN) is None


def test_a_prefix_must_be_unique(tmp_path: Path) -> None:
    """`last` and unique beginnings are found; ambiguous and unknown ones are errors."""
    store = Store(str(tmp_path / "runs"))
    for run in ("0123456789ab", "0123456789ac"):
        store.create(_plan(run), _record(run))

    assert store.find("last") == "0123456789ac"
    assert store.find("0123456789ab") == "0123456789ab"
    for prefix in ("0123", "zzz", ""):
        with pytest.raises(UsageError):
            store.find(prefix)


def test_a_taken_id_is_refused(tmp_path: Path) -> None:
    """A caller may choose an id, but not somebody else's."""
    store = Store(str(tmp_path / "runs"))
    store.reserve(RUN)
    store.create(_plan(), _record())

    with pytest.raises(UsageError):
        store.reserve(RUN)


def test_events_end_where_a_crash_cut_them(tmp_path: Path) -> None:
    """Whole lines are read; a torn last line is not."""
    store = Store(str(tmp_path / "runs"))
    store.create(_plan(), _record())
    Path(store.events_path(RUN)).write_text('{"event":"a"}\n{"event":"b"}\n{"eve')

    assert [event["event"] for event in store.events(RUN)] == ["a", "b"]
