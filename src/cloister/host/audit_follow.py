"""The lines of an audit log from one number on, as they come: for what sends them elsewhere.

The log itself is the queue: whoever remembers the number of the last line that arrived can go on from there after any
crash, of ours or of the receiver. Reads segments while their keeper appends, packs and removes them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cloister.host.audit_files import Segment, segments
from cloister.host.audit_segments import Opened

_BLOCK = 256 * 1024
_HEAD = re.compile(rb'\{"seq":([0-9]{1,19}),')
_TAIL = re.compile(rb',"hash":"[0-9a-f]{64}"\}')
_TAIL_BYTES = 75


class Line(NamedTuple):
    """One line of the log, without its newline."""

    seq: int
    raw: bytes


class Following:
    """Lines after one number, in order."""

    def __init__(self, directory: str, after: int) -> None:
        """Begin with the line that follows `after`; 0 means the first one that is there."""
        self.directory = directory
        self.after = after
        self.removed = 0
        """Lines that were removed from the log before they were read."""
        self.unreadable = 0
        """Lines that no keeper writes, which were passed over."""
        self._found = False
        self._segment: Segment | None = None
        self._at = 0

    def more(self) -> list[Line]:
        """Return lines that follow, not many at a time; nothing when there is nothing new.

        Raises:
            OSError: the log cannot be read.
            ValueError: a packed segment is damaged.
        """
        for _ in range(3):  # a segment may be packed, or end, between two looks
            there = segments(self.directory)
            segment = self._current(there)
            if segment is None:
                return []
            try:
                if found := self._read(segment):
                    return found
            except FileNotFoundError:
                self._segment = None
                continue
            younger = [one for one in there if one.first > segment.first]
            if not younger:
                return []
            self._segment, self._at = younger[0], 0
        return []

    def _current(self, there: list[Segment]) -> Segment | None:
        """Return the segment to read from, under the name that it has now."""
        if self._segment is not None:
            same = [one for one in there if one.first == self._segment.first]
            if same:
                self._segment = same[0]
                return self._segment
        older = [one for one in there if one.first <= self.after + 1]
        self._segment, self._at = (older[-1] if older else there[0]) if there else None, 0
        return self._segment

    def _read(self, segment: Segment) -> list[Line]:
        """Return the lines of one block that were not read yet."""
        found: list[Line] = []
        with Opened(segment) as opened:
            for at, block in opened.blocks(self._at, opened.size, _BLOCK):
                self._at = at + len(block)
                for raw in block.splitlines():
                    self._take(raw, found)
                if found:
                    return found
        return found

    def _take(self, raw: bytes, found: list[Line]) -> None:
        """Take over a line. Numbers count until the first one that is new; from there on the order of the file does.

        So a line with a wrong number, which is damage, never hides those that follow it.
        """
        seq = number_of(raw)
        if seq is None:
            self.unreadable += 1
        elif self._found or seq > self.after:
            self._found = True
            self.removed += max(0, seq - self.after - 1)
            self.after = seq
            found.append(Line(seq, raw))


def number_of(raw: bytes) -> int | None:
    """Return the number of a line; None where it does not have the form of one."""
    head = _HEAD.match(raw)
    return int(head[1]) if head and _TAIL.fullmatch(raw[-_TAIL_BYTES:]) else None


def last_number(directory: str) -> int:
    """Return the number of the last whole line of a log; 0 where there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: a packed segment is damaged.
    """
    for segment in reversed(segments(directory)):
        with Opened(segment) as opened:
            for block in opened.blocks_backwards():
                for raw in reversed(block.splitlines()):
                    if (seq := number_of(raw)) is not None:
                        return seq
    return 0
