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
_SEQ = re.compile(rb'\{"seq":([0-9]{1,19}),')


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
        """Return the lines of one block that were not read yet; what is no line of the log is passed over."""
        found: list[Line] = []
        with Opened(segment) as opened:
            for at, block in opened.blocks(self._at, opened.size, _BLOCK):
                self._at = at + len(block)
                for raw in block.split(b"\n"):
                    match = _SEQ.match(raw)
                    if match and int(match[1]) > self.after:
                        found.append(self._take(int(match[1]), raw))
                if found:
                    return found
        return found

    def _take(self, seq: int, raw: bytes) -> Line:
        if seq > self.after + 1:
            self.removed += seq - self.after - 1
        self.after = seq
        return Line(seq, raw)
