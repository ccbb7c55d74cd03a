"""Who asked for a detached run, and is told what came of it: the id of one that runs, or why there is none."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import msgspec

from cloister.runs.links import Link


class Starter(NamedTuple):
    """Who waits for the id of a detached run."""

    link: Link
    output: int
    """A descriptor of our own for its standard output."""
    json: bool

    def tell(self, run: str) -> None:
        """Tell the id of the run, now that it can be worked with."""
        shown = msgspec.json.encode({"run": run}).decode() if self.json else run
        with contextlib.suppress(OSError):  # it may have gone, or closed its output
            os.write(self.output, f"{shown}\n".encode())
        self._leave(b"\0")

    def fail(self, run: str, code: int, reason: str, text: str = "") -> None:
        """Say why there is nothing to work with: the run is over, and its agent never ran."""
        text = text or f"cloister: the run ended before its agent ran [{reason}]\n  try: cloister why {run}"
        self._leave(bytes([code & 255]) + f"{text}\n".encode("utf-8", "backslashreplace"))

    def _leave(self, last: bytes) -> None:
        os.close(self.output)
        self.link.send("F", last)
        self.link.close()
