"""The list of runs: records of the store held against what the broker says is alive.

A record that says "running" proves nothing: its broker may have been killed. Such a run shows
as `died`; the next broker undoes what it left and closes the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from cloister.runs.store import Record, Store

State = Literal["starting", "running", "finished", "died"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One run as it is listed. Times are seconds since the epoch."""

    id: str
    agent: str
    status: State
    workspace: str
    command: tuple[str, ...]
    started: float
    finished: float | None
    exit_code: int | None
    reason: str
    denials: int
    """Connections and requests refused so far."""
    detached: bool
    mode: str
    budget: str = ""
    """The share of a budget that was passed last, such as `80 % of tokens_per_day`; empty where none was."""
    unrecorded: str = ""
    """Why the audit log cannot be written; empty where it can."""


def list_runs(store: Store, living: frozenset[str] | None, *, everything: bool) -> list[Row]:
    """Return runs, oldest first.

    Args:
        store: where the records are.
        living: ids the broker knows, asked for after this was called or before; None without a broker.
        everything: finished ones as well.
    """
    rows = []
    for run in store.ids():
        record = store.record(run)
        if record is None:
            continue
        if record.status != "finished" and run not in (living or ()):
            record = store.record(run) or record  # it may have ended in between
        if everything or record.status != "finished":
            rows.append(row_of(store, record, living))
    return rows


def row_of(store: Store, record: Record, living: frozenset[str] | None) -> Row:
    """Return one run's row."""
    over = record.status == "finished"
    return Row(
        id=record.id,
        agent=record.agent,
        status=record.status if over or record.id in (living or ()) else "died",
        workspace=record.workspace,
        command=record.command,
        started=record.started,
        finished=record.finished,
        exit_code=record.exit_code,
        reason=record.reason,
        denials=count_denials(store, record.id),
        detached=record.detached,
        mode=record.mode,
        budget=last_alert(store, record.id),
        unrecorded="" if over else record.unrecorded,
    )


def count_denials(store: Store, run: str) -> int:
    """Count refused connections without decoding each line: quotes inside a value are escaped in JSON."""
    try:
        with Path(store.events_path(run)).open("rb") as file:
            return sum(1 for line in file if b'"event":"egress"' in line and b'"verdict":"allow"' not in line)
    except FileNotFoundError:
        return 0


def last_alert(store: Store, run: str) -> str:
    """Return which share of a budget a run passed last, as far as it is recorded: `80 % of tokens_per_day`."""
    try:
        with Path(store.events_path(run)).open("rb") as file:
            lines = [line for line in file if line.startswith(b'{"event":"budget-alert"')]
        event = msgspec.json.decode(lines[-1], type=dict[str, Any]) if lines else {}
    except (FileNotFoundError, msgspec.DecodeError):
        return ""
    return f"{event['percent']} % of {str(event['reason']).replace('-', '_')}" if event else ""
