"""Recordings of model calls, read: from a run's sealed file to its calls. `recordings` writes them.

Imported late: it brings cryptography with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from cloister.errors import UsageError
from cloister.host import recordings as files
from cloister.llm.recording import Frame, open_frames


@dataclass(slots=True)
class Recorded:
    """One call of a recording; a value that was not written is empty."""

    call: str
    time: float = 0.0
    model: str = ""
    provider: str = ""
    route: str = ""
    stream: bool = False
    request_fields: list[str] = field(default_factory=list)
    request_bytes: int = 0
    request_kept: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Of each attempt that was answered: status, provider, request_id, fields, bytes."""
    outcome: str = ""
    """Empty: its end was not recorded."""
    answer_bytes: int = 0
    answer_kept: int = 0
    bodies: list[tuple[str, bytearray]] = field(default_factory=list, repr=False)
    """Request first, then one per answer; filled for one call only."""

    @property
    def status(self) -> int:
        """Of the last answer; 0 without one."""
        return int(self.answers[-1]["status"]) if self.answers else 0

    @property
    def whole(self) -> bool:
        """Whether everything of it is there."""
        return bool(self.outcome) and self.request_kept == self.request_bytes and self.answer_kept == self.answer_bytes


@dataclass(slots=True)
class Recording:
    """The calls of one run."""

    calls: dict[str, Recorded] = field(default_factory=dict)
    closed: bool = False
    """Whether the file has its end; one of a living run, a killed broker or a full disk has none."""


def read_recording(path: str, run: str, wrapping: bytes, recording: Recording, *, bodies_of: str = "") -> None:
    """Read a run's recording into `recording`; what is in it when this raises is genuine.

    Args:
        path: of the file.
        run: whose it must be.
        wrapping: the recordings' key of the user.
        recording: filled.
        bodies_of: the call whose bodies are kept; those of others are opened and forgotten.

    Raises:
        UsageError: nothing was recorded.
        DeniedError: it was changed, or is not this user's.
    """
    try:
        with files.reading(path) as read:
            for frame in open_frames(read, wrapping, run):
                if frame.kind == "close":
                    recording.closed = True
                else:
                    one = recording.calls.setdefault(frame.call, Recorded(frame.call))
                    _add(one, frame, keep=frame.call == bodies_of)
    except FileNotFoundError:
        raise UsageError(
            "recording-none", "no model calls of this run were recorded", where=run,
            remedy="llm = { record = true } in the agent's table, for runs to come",
        ) from None  # fmt: skip


def _add(one: Recorded, frame: Frame, *, keep: bool) -> None:
    """Take one frame."""
    if frame.kind in {"begin", "head", "end"}:
        about = msgspec.json.decode(frame.data, type=dict[str, Any])
        if frame.kind == "begin":
            one.time, one.model, one.provider = about["time"], about["model"], about["provider"]
            one.route, one.stream, one.request_fields = about["route"], about["stream"], about["fields"]
            one.request_bytes, one.request_kept = about["bytes"], about["kept"]
            one.bodies.append(("request", bytearray()))
        elif frame.kind == "head":
            one.answers.append({**about, "bytes": 0})
            one.bodies.append(("answer", bytearray()))
        else:
            one.outcome, one.answer_bytes, one.answer_kept = about["outcome"], about["bytes"], about["kept"]
        return
    if frame.kind == "answer" and one.answers:
        one.answers[-1]["bytes"] += len(frame.data)
    if keep and one.bodies:
        one.bodies[-1][1].extend(frame.data)
