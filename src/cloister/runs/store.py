"""The run store: one directory per run, plain JSON, written so that a crash loses nothing.

    plan.json      before the first step, so that it can be undone from the file alone
    run.json       the record below, replaced as the run goes on
    events.jsonl   egress decisions, questions, warnings, in order; a gateway's older ones are in events.earlier.jsonl
    receipt.json   at the end; a run without one did not end in order

Files are replaced by rename, never edited. What a run left on the host is undone by
`host/apply.py`; what may be removed is in `collect`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import msgspec

from cloister.errors import UsageError
from cloister.host import removal
from cloister.plan.steps import Plan
from cloister.plan.vm import CONSOLE, DIRECTORY

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letters that look like digits
_ID_LENGTH = 12
_CHANCE = 3
_T = TypeVar("_T")
Status = Literal["starting", "running", "finished"]


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """What is known about a run while it lasts. Times are seconds since the epoch."""

    id: str
    agent: str
    workspace: str
    command: tuple[str, ...]
    status: Status
    started: float
    broker_pid: int
    client_pid: int = 0
    detached: bool = False
    mode: str = "direct"
    user: str = ""
    """Whose run it is, in the records of the system's broker."""
    finished: float | None = None
    exit_code: int | None = None
    reason: str = ""
    unrecorded: str = ""
    """Why the audit log cannot be written at present; nothing when it can."""


class Direct(msgspec.Struct, frozen=True):
    """Connections that did not go through the proxy, as the packet filter counted them."""

    connections: int
    """Packets that opened something: one for each TCP connection (and each retry), UDP exchange or ping."""
    names: int
    """Questions to the host's resolver."""
    bytes_up: int
    bytes_down: int
    refused: dict[str, int]
    """Refused packets, by what the address is or by the deny rule."""


class ModelUse(msgspec.Struct, kw_only=True, frozen=True):
    """What the model calls of one run used together."""

    calls: int
    tokens: int
    """Input and output."""
    cost_usd: float


class Receipt(msgspec.Struct, kw_only=True, frozen=True):
    """What happened, in the end: the answer to "what did it do, under which rules?"."""

    id: str
    agent: str
    preset: str
    isolation: str
    workspace: str
    command: tuple[str, ...]
    started: float
    finished: float
    exit_code: int
    reason: str
    policy_digest: str
    plan_digest: str
    host: dict[str, Any]
    probe: tuple[str, ...]
    limits: tuple[str, ...]
    opt_outs: tuple[str, ...]
    notices: tuple[str, ...]
    connections: int
    denials: int
    bytes_up: int
    bytes_down: int
    denied: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    credentials: tuple[str, ...] = ()
    """Which credential was used how often and where, by name."""
    model_use: ModelUse | None = None
    """Units only: what the run's model calls used. They are in the system's ledger, which no user can read."""
    direct: Direct | None = None
    """Mode `internet` only: what went past the proxy. None there means that the counters were lost."""


def new_id(now: float) -> str:
    """Return an id that sorts by time: nine letters of milliseconds, three of chance."""
    left, letters = int(now * 1000), ""
    for _ in range(_ID_LENGTH - _CHANCE):
        letters = _ALPHABET[left & 31] + letters
        left >>= 5
    return letters + "".join(secrets.choice(_ALPHABET) for _ in range(_CHANCE))


class Store:
    """Records of all runs of one user, below one directory."""

    def __init__(self, directory: str) -> None:
        """Use `directory`; it is made when the first run is."""
        self.directory = directory

    def create(self, plan: Plan, record: Record) -> None:
        """Write plan and record of a new run, before anything else is done for it."""
        os.makedirs(self._path(plan.run), mode=0o700, exist_ok=True)
        self._write(plan.run, "plan.json", msgspec.json.encode(plan.recorded()))
        self.update(record)

    def reserve(self, run: str) -> None:
        """Check an id that the caller chose.

        Raises:
            UsageError: it is no id, or it is taken.
        """
        if os.path.lexists(self._path(run)):
            raise UsageError("run-exists", f"the id {run!r} is taken")

    def update(self, record: Record) -> None:
        """Replace the record."""
        self._write(record.id, "run.json", msgspec.json.encode(record))

    def finish(self, record: Record, receipt: Receipt) -> None:
        """Write the receipt, then the last record: a finished run always has a receipt."""
        self._write(record.id, "receipt.json", msgspec.json.encode(receipt))
        self.update(record)

    def plan(self, run: str) -> Plan | None:
        """Return the stored plan, or None where it was never completely written."""
        return self._read(run, "plan.json", Plan)

    def record(self, run: str) -> Record | None:
        """Return the record, or None."""
        return self._read(run, "run.json", Record)

    def receipt(self, run: str) -> Receipt | None:
        """Return the receipt, or None while the run lasts."""
        return self._read(run, "receipt.json", Receipt)

    def events_path(self, run: str) -> str:
        """Return the path of the events file."""
        return f"{self._path(run)}/events.jsonl"

    def earlier_events_path(self, run: str) -> str:
        """Return the path of a gateway's events before those, where there were too many for one file."""
        return f"{self._path(run)}/events.earlier.jsonl"

    def output_path(self, run: str) -> str:
        """Return the path of a detached run's output."""
        return f"{self._path(run)}/output.log"

    def console_path(self, run: str) -> str:
        """Return the path of the end of what a run's guest printed."""
        return f"{self._path(run)}/{DIRECTORY}/{CONSOLE}"

    def events(self, run: str) -> Iterator[dict[str, Any]]:
        """Yield the events in order; a line cut off by a crash ends the list."""
        try:
            with open(self.events_path(run), "rb") as file:
                for line in file:
                    try:
                        yield msgspec.json.decode(line, type=dict[str, Any])
                    except msgspec.DecodeError:
                        return
        except FileNotFoundError:
            return

    def ids(self) -> list[str]:
        """Return all ids, oldest first."""
        try:
            return sorted(name for name in os.listdir(self.directory) if is_id(name))
        except FileNotFoundError:
            return []

    def find(self, prefix: str) -> str:
        """Return the id that starts with `prefix`; `last` is the newest.

        Raises:
            UsageError: none or several.
        """
        ids = self.ids()
        if prefix == "last" and ids:
            return ids[-1]
        found = [run for run in ids if prefix and run.startswith(prefix)]
        if len(found) != 1:
            what = "no run" if not found else f"{len(found)} runs"
            raise UsageError("run-unknown", f"{what} with the id {prefix!r}", remedy="cloister ps --all")
        return found[0]

    def remove(self, run: str) -> None:
        """Remove everything recorded about a run."""
        removal.sweep(self._path(run))

    def _path(self, run: str) -> str:
        if not is_id(run):
            raise UsageError("run-unknown", f"{run!r} is not the id of a run", remedy="cloister ps --all")
        return f"{self.directory}/{run}"

    def _write(self, run: str, name: str, data: bytes) -> None:
        target = f"{self._path(run)}/{name}"
        descriptor = os.open(
            f"{target}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        os.rename(f"{target}.new", target)

    def _read(self, run: str, name: str, kind: type[_T]) -> _T | None:
        try:
            with open(f"{self._path(run)}/{name}", "rb") as file:
                return msgspec.json.decode(file.read(), type=kind)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def is_id(text: str) -> bool:
    """Tell whether a text is shaped like the id of a run."""
    return len(text) == _ID_LENGTH and all(char in _ALPHABET for char in text)
