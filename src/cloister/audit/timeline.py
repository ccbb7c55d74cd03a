"""What happened in one run, in order: lanes, a tree of processes, sums. Made from events, wherever they are from.

Events of the same process that only go on with what it was doing (a search opens thousands of files) are folded into
one entry, which stands where the first of them stood and keeps their texts. Nothing is left out. How it is shown is
for `timeline_text` and `timeline_html`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from cloister.audit.describe import LANES, command, describe, lane, process
from cloister.audit.event import Event, Process
from cloister.audit.kept import severity

_FOLD_NS = 1_000_000_000
"""What a process does with files within a second of the first is one entry."""
_FOLDED = {
    "file.opened": "opened", "file.created": "created", "file.deleted": "deleted", "file.renamed": "renamed",
    "file.attributes-changed": "changed attributes of", "process.forked": "forked", "process.exited": "ended",
    "network.sent": "sent to",
}  # fmt: skip
_HIGH = 4
_MEDIUM = 3


class Entry(msgspec.Struct):
    """One line of a timeline."""

    time: int
    """Of the first event, in nanoseconds since the epoch."""
    lane: str
    kind: str
    text: str
    tone: str = ""
    """`denied`, `warning`, `alarm`, or nothing."""
    last: int = 0
    """Of the last event that was folded into it."""
    folded: list[str] = []
    """The texts of all of them, where there are several."""


class Node(msgspec.Struct):
    """One process, and those that it made."""

    name: str
    command: str
    started: int
    ended: int = 0
    files: int = 0
    connections: int = 0
    children: list[Node] = []


class Sums(msgspec.Struct):
    """Numbers over the whole run."""

    events: int = 0
    lanes: Counter[str] = msgspec.field(default_factory=Counter)
    denied: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    programs: int = 0
    detections: int = 0


class Timeline(msgspec.Struct):
    """A run as it went."""

    run: str
    agent: str = ""
    user: str = ""
    account: str = ""
    command: str = ""
    workspace: str = ""
    policy: str = ""
    plan: str = ""
    reason: str = ""
    """Why it ended; empty while it lives, or where its end is not on record."""
    exit_code: int | None = None
    first: int = 0
    last: int = 0
    sums: Sums = msgspec.field(default_factory=Sums)
    entries: list[Entry] = []
    processes: list[Node] = []


def build(run: str, events: Iterable[Event]) -> Timeline:
    """Return the timeline of a run from its events; they may come a little out of order, as the kernel's do."""
    made = Timeline(run, entries=[], processes=[])
    tree = _Tree()
    folder = _Folder()
    for event in sorted(events, key=lambda one: one.time):
        _life(made, event)
        _add_up(made.sums, event)
        tree.take(event)
        folder.take(event)
    made.entries = folder.entries
    made.processes = tree.roots
    return made


def _life(made: Timeline, event: Event) -> None:
    """Take over what is said of the run itself."""
    made.first = made.first or event.time
    made.last = max(made.last, event.time)
    made.agent, made.user = made.agent or event.agent, made.user or event.user
    made.account = made.account or event.account
    if event.kind == "run.started":
        made.policy, made.plan, made.command = event.policy, event.plan, event.message
        made.workspace = str(event.details.get("workspace", ""))
    elif event.kind == "run.ended":
        made.reason = event.reason or "ended"
        code = event.details.get("exit_code")
        made.exit_code = code if isinstance(code, int) else None


def _add_up(sums: Sums, event: Event) -> None:
    sums.events += event.count
    sums.lanes[lane(event)] += event.count
    sums.denied += event.disposition == "blocked"
    sums.programs += event.kind == "process.executed"
    sums.detections += event.kind == "detection.matched"
    if event.kind.startswith("egress."):
        sums.bytes_up += event.bytes_up
        sums.bytes_down += event.bytes_down
    if event.model:
        sums.tokens += event.model.tokens
        sums.cost_usd += event.model.cost_usd


class _Folder:
    """Makes entries of events."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._open: dict[tuple[str, str, str], Entry] = {}

    def take(self, event: Event) -> None:
        text, tone = describe(event), _tone(event)
        key = (event.kind, _identity(event.process), tone)
        if event.kind in _FOLDED and event.process:
            held = self._open.get(key)
            if held and event.time - held.time < _FOLD_NS:
                held.folded = held.folded or [held.text]
                held.folded.append(text)
                held.last = event.time
                what = "times" if event.kind.startswith("process.") else "files" if held.lane == "file" else "times"
                held.text = f"{process(event.process)}  {_FOLDED[event.kind]} {len(held.folded):,} {what}"
                return
        entry = Entry(event.time, lane(event), event.kind, text, tone, event.time, [])
        self.entries.append(entry)
        if event.kind in _FOLDED and event.process:
            self._open[key] = entry


class _Tree:
    """Makes a tree of processes, by their identities that outlive pids."""

    def __init__(self) -> None:
        self.roots: list[Node] = []
        self._known: dict[str, Node] = {}

    def take(self, event: Event) -> None:
        held = event.process
        if held is None or not held.uid:
            return
        node = self._known.get(held.uid)
        if node is None:
            node = self._known[held.uid] = Node(process(held), "", event.time, children=[])
            parent = self._known.get(held.parent_uid)
            (parent.children if parent else self.roots).append(node)
        if event.kind == "process.executed":
            node.name, words = process(held), command(held)
            node.command = f"{node.command}  then  {words}" if node.command else words
        elif event.kind == "process.exited":
            node.ended = event.time
        node.files += event.kind.startswith("file.")
        node.connections += event.kind.startswith("network.")


def _identity(held: Process | None) -> str:
    return (held.uid or str(held.pid)) if held else ""


def _tone(event: Event) -> str:
    if event.kind == "detection.matched" or severity(event) >= _HIGH:
        return "alarm"
    if event.disposition == "blocked":
        return "denied"
    return "warning" if severity(event) >= _MEDIUM or event.error else ""


def lanes(made: Timeline) -> tuple[str, ...]:
    """Return the lanes in which something happened, in their order."""
    return tuple(name for name in LANES if made.sums.lanes.get(name))
