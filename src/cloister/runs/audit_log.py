"""A log of the audit, to be asked: which one, what is in it, quickly. Reads segments and their index, writes no log.

The index says where to look; what is returned was read from the segments and tested again. So a wrong index can hide
events until it is rebuilt, and never show one that is not there; a chunk whose lines are not where they should be is
dropped and read anew. Whether a log is whole is asked of `cloister audit verify`, not of this.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator

from cloister.audit import kept
from cloister.audit.event import Event
from cloister.audit.kept import Kept
from cloister.audit.question import MOST_SEVERE, Question, hosts_of, is_pattern, one_of, paths_of
from cloister.host.audit_files import Segment, segments
from cloister.host.audit_index import AuditIndex, Chunk, Progress, Wanted
from cloister.host.audit_postings import positions, to_bits
from cloister.host.audit_segments import BLOCK, Opened

SYSTEM_LOG = "/var/log/cloister/audit"
_OPEN_SEGMENTS = 8
_NEAR = 64 * 1024
"""Lines closer together than this are read with one call."""
_NEWEST_BLOCK = 64 * 1024


class AuditLog:
    """One log and its index."""

    def __init__(self, directory: str, index: str) -> None:
        """Ask the log in a directory; its index is the file `index`, made when it is first needed."""
        self.directory = directory
        self._index_path = index
        self._index: AuditIndex | None = None
        self._opened: OrderedDict[int, Opened] = OrderedDict()
        self._segments: dict[int, Segment] = {}
        self.unreadable = 0
        """Lines met that are no events."""
        self.changed = False
        """A segment was not what had been indexed: it is indexed again with the next `refresh`."""

    def close(self) -> None:
        """Let go of index and segments."""
        if self._index:
            self._index.close()
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def refresh(self, told: Callable[[Progress], None] | None = None) -> None:
        """Bring the index up to date.

        Raises:
            OSError: the log cannot be read, or the index cannot be written.
        """
        if self._index is None:
            self._index = AuditIndex(self._index_path, self.directory, kept.severities())
        self._index.refresh(told)
        self._segments = {segment.first: segment for segment in segments(self.directory)}

    def newest(self, question: Question, count: int) -> list[Kept]:
        """Return the last `count` events that are meant, oldest first; without the index.

        Raises:
            OSError: the log cannot be read.
        """
        test, found = question.test(), []
        for segment in reversed(segments(self.directory)):
            with Opened(segment) as opened:
                for block in opened.blocks_backwards(_NEWEST_BLOCK):
                    for line in reversed(block.splitlines()):
                        event = self._read(line)
                        if event and test(event):
                            found.append(event)
                            if len(found) >= count:
                                return found[::-1]
        return found[::-1]

    def find(self, question: Question, *, newest_first: bool = False) -> Iterator[Kept]:
        """Yield the events that are meant, in the order of the log or in the opposite one. Call `refresh` before."""
        index, test = self._ready(), question.test()
        rest = self._rest(index)
        if newest_first:
            yield from (event for event in reversed([event for event in rest if test(event)]))
        wanted = conditions(question)
        for chunk in index.chunks(question.since, question.until, newest_first=newest_first):
            places = positions(self._meant(index, chunk, question, wanted))
            for event in self._events(index, chunk, places[::-1] if newest_first else places):
                if test(event):
                    yield event
        if not newest_first:
            yield from (event for event in rest if test(event))

    def count(self, question: Question, by: str) -> Counter[str]:
        """Return how many events are meant, by the values of a word of the index. Call `refresh` before.

        An event with two values of the word (a rename has two paths) counts for both; where paths or hosts are asked
        for, only those count.
        """
        index, sums = self._ready(), Counter[str]()
        test, wanted = question.test(), conditions(question)
        for chunk in index.chunks(question.since, question.until, newest_first=False):
            if not wanted and _within(chunk, question):
                sums.update(dict(index.sums(chunk, by)))
            elif meant := self._meant(index, chunk, question, wanted):
                sums.update({value: (held & meant).bit_count() for value, held in index.sets(chunk, by)})
        for event in self._rest(index):
            if test(event):
                sums.update(value for value in values_of(event, by))
        asked = {"path": question.paths, "host": tuple(host.lower() for host in question.hosts)}.get(by, ())
        meant_value = one_of(asked) if asked else bool
        return Counter({value: count for value, count in sums.items() if count and (not asked or meant_value(value))})

    def span(self) -> tuple[int, int]:
        """Return the times of the earliest and the latest indexed event, in nanoseconds; zeros where there is none."""
        chunks = self._ready().chunks(0, 2**63 - 1, newest_first=False)
        return min((chunk.since for chunk in chunks), default=0), max((chunk.until for chunk in chunks), default=0)

    def _ready(self) -> AuditIndex:
        if self._index is None:
            self.refresh()
        assert self._index is not None  # noqa: S101  # for the type checker: `refresh` has just made it
        return self._index

    def _rest(self, index: AuditIndex) -> list[Kept]:
        """Return the events that are not indexed yet: the end of the newest segment."""
        indexed, found = index.indexed(), []
        for segment in self._segments.values():
            at = indexed.get(segment.first, 0)
            opened = self._open(segment.first)
            if opened and opened.size > at:
                for _, block in opened.blocks(at, opened.size):
                    found += [event for line in block.splitlines() if (event := self._read(line))]
        return found

    def _meant(self, index: AuditIndex, chunk: Chunk, question: Question, wanted: tuple[Wanted, ...]) -> int:
        """Return the events of a chunk that fulfil the conditions, their time included, as bits."""
        found = index.places(chunk, wanted)
        if not found or _within(chunk, question):
            return found
        opened = self._open(chunk.segment)
        if opened is None:
            return 0
        ends, in_time = index.ends(chunk), []
        data = opened.read(chunk.start, ends[-1])
        for place in positions(found):
            line = data[ends[place - 1] if place else 0 : ends[place]]
            if question.since <= kept.moment(line) <= question.until:
                in_time.append(place)
        return to_bits(in_time, chunk.events)

    def _events(self, index: AuditIndex, chunk: Chunk, places: list[int]) -> Iterator[Kept]:
        """Yield the events at some positions of a chunk; nothing of a segment that is gone."""
        opened = self._open(chunk.segment) if places else None
        if opened is None:
            return
        ends = index.ends(chunk)
        for lines in _near(places, ends):
            start = ends[min(lines) - 1] if min(lines) else 0
            try:
                data = opened.read(chunk.start + start, ends[max(lines)] - start)
            except ValueError:  # packed and damaged
                self.unreadable += len(lines)
                continue
            for place in lines:
                before = ends[place - 1] if place else 0
                if event := kept.read(data[before - start : ends[place] - start]):
                    yield event
                else:
                    self.changed = True
        if self.changed:
            index.drop(chunk.segment)

    def _open(self, first: int) -> Opened | None:
        """Return a segment, open; the least used of many is closed again."""
        if first in self._opened:
            self._opened.move_to_end(first)
            return self._opened[first]
        segment = self._segments.get(first)
        if segment is None:
            return None
        try:
            opened = Opened(segment)
        except FileNotFoundError:  # packed or removed since we looked
            self._segments = {found.first: found for found in segments(self.directory)}
            segment = self._segments.get(first)
            if segment is None:
                return None
            opened = Opened(segment)
        self._opened[first] = opened
        if len(self._opened) > _OPEN_SEGMENTS:
            self._opened.popitem(last=False)[1].close()
        return opened

    def _read(self, line: bytes) -> Kept | None:
        event = kept.read(line)
        self.unreadable += event is None
        return event


class Follower:
    """What is added to a log from now on."""

    def __init__(self, directory: str) -> None:
        """Begin at the end of the newest segment."""
        self.directory = directory
        there = segments(directory)
        self._first = there[-1].first if there else -1
        self._at = os.stat(there[-1].path).st_size if there and not there[-1].compressed else 0
        self._packed = bool(there and there[-1].compressed)

    def added(self) -> Iterator[Kept]:
        """Yield the events that have come since the last call.

        Raises:
            OSError: the log cannot be read any more.
        """
        for segment in segments(self.directory):
            if segment.first < self._first or (segment.first == self._first and self._packed):
                continue
            if segment.first > self._first:
                self._first, self._at = segment.first, 0
            try:
                with Opened(segment) as opened:
                    for at, block in opened.blocks(self._at, opened.size, BLOCK):
                        self._at = at + len(block)
                        yield from (event for line in block.splitlines() if (event := kept.read(line)))
            except FileNotFoundError:
                continue  # packed just now: found under its new name with the next look


def conditions(question: Question) -> tuple[Wanted, ...]:
    """Return what the index is asked. The time is not among it: chunks have theirs."""
    found = []
    for word, values in (
        ("run", question.runs),
        ("agent", question.agents),
        ("user", question.users),
        ("kind", question.kinds),
        ("decision", question.decisions),
        ("host", tuple(host.lower() for host in question.hosts)),
        ("path", question.paths),
        ("rule", question.rules),
    ):
        if values:
            plain = tuple((word, value) for value in values if not is_pattern(value))
            patterns = tuple((word, value) for value in values if is_pattern(value))
            found.append(Wanted(plain, patterns))
    if question.severity > 1:
        found.append(Wanted(tuple(("severity", str(number)) for number in range(question.severity, MOST_SEVERE + 1))))
    return tuple(found)


def values_of(event: Event, word: str) -> Iterable[str]:
    """Return the values that an event has of a word of the index."""
    match word:
        case "severity":
            return (str(kept.severity(event)),)
        case "decision":
            return (event.disposition,)
        case "host":
            return dict.fromkeys(filter(None, hosts_of(event)))
        case "path":
            return dict.fromkeys(filter(None, paths_of(event)))
        case "rule":
            return (event.rule,) if event.rule else ()
    found: str = getattr(event, word)
    return (found,)


def _within(chunk: Chunk, question: Question) -> bool:
    return question.since <= chunk.since and chunk.until <= question.until


def _near(places: list[int], ends: array[int]) -> Iterator[list[int]]:
    """Yield positions in groups that are worth one read; rising or falling, as they come."""
    group: list[int] = []
    for place in places:
        if group and abs(ends[place] - ends[group[0]]) > _NEAR:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
