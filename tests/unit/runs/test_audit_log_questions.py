"""Asking a log: what the index finds is what reading everything finds, whatever happens to the files meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cloister.audit import kept
from cloister.audit.question import Question, resolve
from cloister.host.audit_files import segments
from cloister.host.audit_pack import MEMBER, Packed, pack
from cloister.host.audit_segments import Opened
from cloister.runs.audit_log import AuditLog, Follower, values_of
from support.audit_log import START_NS, Writer, busy_day, pack_segment, run_ids, small_day

RUN = run_ids(40)[3]
QUESTIONS = {
    "everything": Question(),
    "run": Question(runs=(RUN,)),
    "run-prefix": Question(runs=(f"{RUN[:4]}*",)),
    "agent": Question(agents=("pi",)),
    "two-agents-one-user": Question(agents=("pi", "codex"), users=("bob",)),
    "kind": Question(kinds=("process.traced", "model.called")),
    "class": Question(kinds=resolve(("1007",))),
    "severity": Question(severity=3),
    "decision": Question(decisions=("blocked",)),
    "host": Question(hosts=("GITHUB.com",)),
    "host-glob": Question(hosts=("*.example.*",)),
    "address": Question(hosts=("198.51.100.7",)),
    "path": Question(paths=("/usr/bin/git",)),
    "path-prefix": Question(paths=("/home/alice/src/app/node_modules/pkg1/*",)),
    "path-suffix": Question(paths=("*/file7.js",)),
    "path-class": Question(paths=("*/pkg[0-3]/lib/file?.js", "*/pkg[!0-9]*")),
    "time": Question(since=START_NS + 400_000 * 5000, until=START_NS + 400_000 * 9000),
    "time-and-host": Question(since=START_NS + 400_000 * 15000, hosts=("github.com",)),
    "nothing": Question(hosts=("nowhere.example",)),
}


class Place:
    """A log in a folder, and its index."""

    def __init__(self, folder: Path, events: int = 20_000, per_segment: int = 6000) -> None:
        self.folder = folder / "log"
        self.index = folder / "index" / "i.db"
        self.writer = Writer(self.folder, per_segment=per_segment)
        self.writer.write_fields(busy_day(events))

    def log(self) -> AuditLog:
        """Open it anew."""
        return AuditLog(str(self.folder), str(self.index))

    def everything(self, question: Question) -> list[int]:
        """Return the numbers of what is meant, by reading all lines."""
        test, found = question.test(), []
        for segment in segments(str(self.folder)):
            with Opened(segment) as opened:
                for _, block in opened.blocks(0, opened.size):
                    found += [event.seq for line in block.splitlines() if (event := kept.read(line)) and test(event)]
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a log of four segments, two of them packed, with small chunks, indexed."""
    made = Place(tmp_path_factory.mktemp("log"))
    for segment in segments(str(made.folder))[:2]:
        pack_segment(Path(segment.path))
    made.log().refresh()
    return made


def numbers(log: AuditLog, question: Question, **how: Any) -> list[int]:
    """Return the numbers of what is found."""
    return [event.seq for event in log.find(question, **how)]


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_index_finds_what_reading_finds(place: Place, name: str) -> None:
    """Each condition, forwards and backwards: all that is meant, nothing else, in order; and counts agree."""
    question, log = QUESTIONS[name], place.log()
    log.refresh()
    truth = place.everything(question)

    assert numbers(log, question) == truth
    assert numbers(log, question, newest_first=True) == truth[::-1]
    assert sum(log.count(question, "kind").values()) == len(truth)
    assert [event.seq for event in log.newest(question, 5)] == truth[-5:]
    assert bool(truth) == (name != "nothing")
    log.close()


@pytest.mark.parametrize("word", ["run", "agent", "user", "severity", "decision", "host", "path"])
def test_counts_are_those_of_reading(place: Place, word: str) -> None:
    """Counted by any word, with and without conditions, by the index as by reading."""
    log = place.log()
    log.refresh()
    for question in (Question(), QUESTIONS["two-agents-one-user"], QUESTIONS["time"]):
        truth: dict[str, int] = {}
        for event in log.find(question):
            for value in values_of(event, word):
                truth[value] = truth.get(value, 0) + 1
        assert dict(log.count(question, word)) == truth
    log.close()


def test_what_is_added_is_found_with_the_next_look(tmp_path: Path) -> None:
    """Events that no chunk holds yet are found; so is what a rotation and a packing leave."""
    place = Place(tmp_path, events=1000, per_segment=10_000)
    log = place.log()
    for step in range(4):
        log.refresh()
        assert numbers(log, Question()) == place.everything(Question())
        place.writer.write(small_day(f"1bbbbbbbbbb{step}"))
        if step == 1:
            place.writer.rotate()
        if step == 2:
            pack_segment(Path(segments(str(place.folder))[0].path))
    log.refresh()
    assert len(numbers(log, Question(runs=("1bbbbbbbbbb3",)))) == 12
    log.close()


def test_removed_segments_leave_the_index(tmp_path: Path) -> None:
    """What retention removed is found no more, and costs no place."""
    place = Place(tmp_path)
    log = place.log()
    log.refresh()
    Path(segments(str(place.folder))[0].path).unlink()
    log.refresh()

    assert numbers(log, Question()) == place.everything(Question())
    assert sum(log.count(Question(), "kind").values()) == 14_000
    log.close()


def test_a_segment_that_vanishes_while_it_is_asked_harms_nothing(tmp_path: Path) -> None:
    """A keeper that packs or removes segments under a reader: packed ones are found under their new name."""
    place = Place(tmp_path)
    log = place.log()
    log.refresh()
    pack_segment(Path(segments(str(place.folder))[0].path))
    Path(segments(str(place.folder))[1].path).unlink()

    assert len(numbers(log, Question())) == 14_000
    log.close()


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 1000, b"SQLite format 3\0" + b"\xff" * 40_000])
def test_a_broken_index_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    """Whatever stands in the file of the index, it is a cache: the answer is the same."""
    place = Place(tmp_path, events=3000)
    place.index.parent.mkdir()
    place.index.write_bytes(damage)
    log = place.log()
    log.refresh()

    assert numbers(log, Question()) == place.everything(Question())
    log.close()


def test_a_log_that_was_replaced_is_indexed_anew(tmp_path: Path) -> None:
    """Files of the same names with other lines (another log, a forged one) are not answered from the old index."""
    place = Place(tmp_path, events=3000)
    place.log().refresh()
    for path in place.folder.iterdir():
        path.unlink()
    Writer(place.folder).write([*small_day("1cccccccccccc"), *small_day("1dddddddddddd")] * 50)
    place.log().refresh()
    for path in place.folder.iterdir():  # the first event, and mostly the inode, are those of before
        path.unlink()
    Writer(place.folder).write([*small_day("1cccccccccccc"), *small_day("1eeeeeeeeeeee")] * 500)
    log = place.log()
    log.refresh()

    assert numbers(log, Question()) == place.everything(Question())
    assert numbers(log, Question(runs=("1eeeeeeeeeeee",)))
    assert not numbers(log, Question(runs=("1dddddddddddd",)))
    log.close()


def test_lines_that_were_changed_in_place_are_never_shown_as_something_else(tmp_path: Path) -> None:
    """The index says where; what stands there is read and tested again, and a chunk that does not fit is dropped."""
    place = Place(tmp_path, events=9000, per_segment=20_000)
    log = place.log()
    log.refresh()
    path = Path(segments(str(place.folder))[0].path)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x" * 5000)
    found = list(log.find(Question(agents=("pi",))))

    assert all(event.agent == "pi" for event in found)
    assert log.changed
    log.refresh()
    assert numbers(log, Question()) == place.everything(Question())
    log.close()


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    """Noise in a segment, a line that is cut, bytes that are no UTF-8: counted where they are met, and no harm."""
    place = Place(tmp_path, events=100)
    path = Path(segments(str(place.folder))[0].path)
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n[]\n{}\nnull\n" + b"{" * 100_000 + b'\n{"time":1e99,"kind":"x"}\n{"seq":101,"ti')
    log = place.log()
    log.refresh()

    assert len(numbers(log, Question())) == 100
    log.close()


@pytest.mark.parametrize("level", [0, 9])
def test_a_packed_segment_is_read_from_any_place(tmp_path: Path, level: int) -> None:
    """Any span of the plain text comes out of the members; gzip itself reads the file as well."""
    import gzip

    Writer(tmp_path / "log").write_fields(busy_day(4000))
    plain = Path(segments(str(tmp_path / "log"))[0].path)
    text = plain.read_bytes()
    target = tmp_path / "x.gz"
    with plain.open("rb") as file:
        target.write_bytes(b"".join(pack(file, level)))
    descriptor = os.open(target, os.O_RDONLY)
    packed = Packed(descriptor)
    for start in (0, 1, MEMBER - 1, MEMBER, len(text) // 2, len(text) - 10, len(text), len(text) + 9):
        assert packed.read(start, 3000) == text[start : start + 3000]
    assert packed.size == len(text)
    assert gzip.decompress(target.read_bytes()) == text
    os.close(descriptor)


def test_gzip_of_others_and_damaged_members(tmp_path: Path) -> None:
    """A file packed by gzip(1) is read; one whose bytes were changed is an error, never wrong lines."""
    import gzip

    text = b"".join(b"%d line\n" % number for number in range(50_000))
    for data, good in ((gzip.compress(text), True), (gzip.compress(text[:9]) + gzip.compress(text[9:]), True)):
        (tmp_path / "a.gz").write_bytes(data)
        descriptor = os.open(tmp_path / "a.gz", os.O_RDONLY)
        assert (Packed(descriptor).read(5, 1000) == text[5:1005]) is good
        os.close(descriptor)
    from io import BytesIO

    data = bytearray(b"".join(pack(BytesIO(text))))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(data)
    descriptor = os.open(tmp_path / "a.gz", os.O_RDONLY)
    with pytest.raises(ValueError, match=r"."):
        Packed(descriptor).read(0, len(text))
    os.close(descriptor)


def test_a_follower_sees_what_comes_over_rotation_and_packing(tmp_path: Path) -> None:
    """Each event once, in order: added, in a new segment, with the old one packed; nothing of before."""
    place = Place(tmp_path, events=50, per_segment=100)
    follower, seen = Follower(str(place.folder)), []
    for step in range(3):
        place.writer.write(small_day())
        if step == 1:
            place.writer.rotate()
        seen += [event.seq for event in follower.added()]
    pack_segment(Path(segments(str(place.folder))[0].path))
    place.writer.write(small_day())
    seen += [event.seq for event in follower.added()]

    assert seen == list(range(51, 99))
