"""Detections beside a keeper: in the log, told to owners of runs, and never in the way of events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloister.audit import kept
from cloister.audit.chain import Chain, Position, encode
from cloister.audit.event import Endpoint, Event, File
from cloister.audit.kept import Kept
from cloister.host.audit_log import Log
from cloister.host.kernel_events import Batch
from cloister.policy.model import Audit, DetectionRule
from cloister.runs.audit_detections import Order, Watch, watch
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.audit_verify import verify
from cloister.services.kernel_source import Source

T = 1_790_000_000_000_000_000
STOP = DetectionRule(name="no-keys", kinds=("file.opened",), paths=("*.key",), action="stop", title="a key was opened")


def opened(path: str, **fields: Any) -> bytes:
    """Return the event of an opened file, as it is put."""
    return encode(Event(time=T, kind="file.opened", run="1aaaaaaaaaaa", user="al", file=File(path=path), **fields))


class Place:
    """A keeper that is watched, in a folder of its own."""

    def __init__(self, folder: Path, audit: Audit | None = None) -> None:
        self.folder = folder
        self.orders: list[Order] = []
        self.log = Log(f"{folder}/log")
        self.keeper = Keeper(self.log, f"{folder}/keys", Rules())
        self.keeper.open()
        self.keeper.wake()
        self.watch = Watch(self.keeper, audit or Audit(rules=(STOP,)), str(folder), self.orders.append, source="auditd")

    def events(self) -> list[Kept]:
        """Return what is in the log."""
        found = [
            kept.read(line)
            for path in sorted(self.folder.glob("log/*.jsonl"))
            for line in path.read_bytes().splitlines()
        ]
        return [event for event in found if event]

    def detections(self) -> list[Kept]:
        """Return the detections that are in the log."""
        return [event for event in self.events() if event.kind == "detection.matched"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Return a keeper that is watched."""
    return Place(tmp_path)


def test_a_match_stands_in_the_log_after_its_event(place: Place) -> None:
    """It is a line like any other, names the number of its event, and the chain holds."""
    place.keeper.put([opened("/srv/a.txt"), opened("/srv/a.key")])
    place.keeper.close()

    (found,) = place.detections()
    assert (found.rule, found.run, found.severity_id) == ("no-keys", "1aaaaaaaaaaa", 3)
    (event,) = [
        one for one in place.events() if one.file and one.file.path == "/srv/a.key" and one.kind == "file.opened"
    ]
    assert found.details["events"] == str(event.seq)
    assert event.seq < found.seq
    assert not verify(f"{place.folder}/log").findings


def test_the_owner_of_a_run_is_told_to_stop_it(place: Place) -> None:
    """A rule with `stop` orders it, once; one without orders nothing."""
    place.keeper.put([opened("/home/al/.ssh/id_rsa"), opened("/srv/a.key"), opened("/srv/b.key")])

    assert place.orders == [Order("1aaaaaaaaaaa", "al", "no-keys", "a key was opened")]
    assert {one.rule for one in place.detections()} == {"no-keys", "secret-file-read"}


def test_a_full_disk_loses_no_match_and_doubles_no_event(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is written stays written when its detection is not; that comes with a later tick."""
    write, calls = place.log.write, []

    def full(data: bytes) -> None:
        calls.append(data)
        if b"detection.matched" in data and len(calls) < 4:
            raise OSError(28, "No space left on device")
        write(data)

    monkeypatch.setattr(place.log, "write", full)
    place.keeper.put([opened("/srv/a.key")])
    assert not place.detections()
    for _ in range(4):
        place.watch.tick(T)

    assert len(place.detections()) == 1
    assert len([one for one in place.events() if one.kind == "file.opened"]) == 1


def test_a_rule_with_a_bug_keeps_no_event_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in a detector is said in the log, once, and the events are there."""

    def broken(_: bytes) -> list[Any]:
        raise RuntimeError("bug")

    monkeypatch.setattr(place.watch._detector, "feed_lines", broken)
    for _ in range(3):
        place.keeper.put([opened("/srv/a.key")])
        place.watch.tick(T)

    kinds = [one.kind for one in place.events()]
    assert kinds.count("file.opened") == 3
    assert kinds.count("log.trouble") == 1


def test_other_rules_count_from_the_next_look(place: Place) -> None:
    """A changed policy is obeyed without a restart; what was seen of hosts stays seen."""
    seen = encode(Event(time=T, kind="egress.decided", run="1", agent="pi", disposition="allowed",
                        endpoint=Endpoint(hostname="a.example.com")))  # fmt: skip
    place.keeper.put([seen])
    place.watch.obey(Audit())
    place.keeper.put([opened("/srv/a.key"), seen])

    assert [one.rule for one in place.detections()] == ["first-seen-host"]


def test_what_was_seen_outlives_the_keeper(tmp_path: Path) -> None:
    """The next keeper knows the hosts of the one before; a broken file makes them new, and harms nothing."""
    seen = encode(Event(time=T, kind="egress.decided", run="1", agent="pi", disposition="allowed",
                        endpoint=Endpoint(hostname="a.example.com")))  # fmt: skip
    for damage, count in ((False, 1), (False, 1), (True, 2)):
        if damage:
            (tmp_path / "detections.json").write_bytes(b"[7")
        place = Place(tmp_path)
        place.keeper.put([seen])
        place.watch.close()
        place.keeper.close()
        assert len(place.detections()) == count


def test_wrong_rules_leave_those_that_come_with_cloister(tmp_path: Path) -> None:
    """A policy whose rules are wrong loses them, says so, and nothing else."""
    place = Place(tmp_path, Audit())
    _, wrong = watch(
        place.keeper, Audit(detections={"nonsense": "off"}), str(tmp_path), lambda _: None, source="broker"
    )
    place.keeper.put([opened("/home/al/.ssh/id_rsa")])

    assert "nonsense" in wrong
    assert [one.rule for one in place.detections()] == ["secret-file-read"]


class _Rings:
    """Stands in for the reader of the kernel's rings: one batch of lines, of which it copies those of files."""

    def __init__(self, events: list[bytes]) -> None:
        self._events, self._lines = events, b""

    def take(self, seq: int, previous: bytes, **_: bool) -> Batch:
        chain = Chain("", Position(seq, previous))
        self._lines = chain.lines(self._events)
        return Batch(memoryview(self._lines), chain.seq, chain.hash, 0)

    def commit(self) -> None:
        self._events = []

    def teed(self) -> bytes:
        return b"".join(line for line in self._lines.splitlines(keepends=True) if b"file." in line)


def test_kernel_events_are_seen_as_well(place: Place) -> None:
    """What the kernel's reader wrote and copied is looked at once it is in the log; the chain holds around matches."""
    source = Source(place.keeper, "/nowhere")
    source._reader = _Rings([opened("/srv/a.key"), encode(Event(time=T, kind="process.exited"))])  # type: ignore[assignment]
    source._drain()
    place.keeper.close()

    (found,) = place.detections()
    (event,) = [one for one in place.events() if one.kind == "file.opened"]
    assert found.details["events"] == str(event.seq)
    assert len(place.orders) == 1
    assert not verify(f"{place.folder}/log").findings
