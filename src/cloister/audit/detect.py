"""Detections: which events, alone or together, are worth telling somebody. Fed event by event; state is bounded.

What a hostile agent can do to it is thought of: state is kept per run, each run has only so much, and a run that needs
more loses its own oldest and is told of as such (`state-limit`): it can neither make the keeper grow nor push out what
is remembered of others. Runs beyond the bound are forgotten oldest first, and a run's state goes when it ends. What
was seen of an agent's hosts outlives runs and restarts (`memory`, `restore`).

Decides; what becomes of a match is for who feeds it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from cloister.audit.describe import describe
from cloister.audit.detect_rules import Compiled, path_gate, plain
from cloister.audit.event import Event
from cloister.audit.kept import Kept

RUNS = 512
SUBJECTS = 256
"""Processes of one run that one rule remembers."""
AGENTS = 256
VALUES = 4096
"""Hosts, files or programs that are remembered of one agent."""
_SEQS = 16
"""Numbers of events that a match names."""
_LONGEST = 255
_MESSAGE = 1024


class Match(NamedTuple):
    """A rule that matched."""

    rule: Compiled
    event: Event
    """The last one of those that made it match."""
    seqs: tuple[int, ...]
    """Their numbers in the log, the newest ones where there are many."""
    times: int = 1
    """How many matches this stands for."""
    reason: str = ""

    @property
    def run(self) -> str:
        """The run it is about; empty where it is about none."""
        return self.event.run

    def as_event(self, time_ns: int, source: str) -> Event:
        """Return it as an event of the log."""
        rule, last = self.rule.rule, self.event
        what = describe(last)
        message = f"{rule.title or rule.name}: {what}" if what else rule.title or rule.name
        return Event(
            time=time_ns, kind="detection.matched", run=last.run, agent=last.agent, user=last.user,
            account=last.account, severity_id=self.rule.severity, rule=rule.name, reason=self.reason,  # type: ignore[arg-type]
            message=message[:_MESSAGE], process=last.process, target=last.target, file=last.file,
            endpoint=last.endpoint, count=self.times, source=source,
            details={"action": rule.action, "events": " ".join(map(str, self.seqs)), "of": last.kind},
        )  # fmt: skip


_Table = OrderedDict[str, deque[tuple[int, int]]] | OrderedDict[str, tuple[int, int]]


class _Window(msgspec.Struct):
    """What one rule remembers of one run."""

    happened: OrderedDict[str, deque[tuple[int, int]]]
    """When, and under which number, by subject."""
    before: OrderedDict[str, tuple[int, int]]
    """When which process did what `after` asks for."""
    told_ns: int = 0
    held_back: int = 0
    limited: bool = False
    last: tuple[Event, tuple[int, ...]] | None = None


class Detector:
    """All rules, and what they remember."""

    def __init__(self, rules: Sequence[Compiled]) -> None:
        """Remember nothing yet."""
        self._by_kind: dict[str, list[Compiled]] = {}
        self._after: dict[str, list[Compiled]] = {}
        for rule in rules:
            for kind in rule.kinds:
                self._by_kind.setdefault(kind, []).append(rule)
            for kind in rule.after_kinds:
                self._after.setdefault(kind, []).append(rule)
        self._runs: OrderedDict[str, dict[str, _Window]] = OrderedDict()
        self._seen: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        self._waiting: dict[int, tuple[_Window, Compiled]] = {}
        self.kinds = frozenset(self._by_kind) | frozenset(self._after) | {"run.ended"}
        """Kinds of events that it needs; others need not be fed."""
        gates = {kind: path_gate(rules, kind) for kind in self.kinds}
        self._gates = {kind: gate for kind, gate in gates.items() if gate}

    def feed(self, event: Event, seq: int) -> list[Match]:
        """Return the matches that an event brings; `seq` is its number in the log."""
        found: list[Match] = []
        for rule in self._by_kind.get(event.kind, ()):
            if rule.test(event):
                found += self._matched(rule, event, seq)
        for rule in self._after.get(event.kind, ()):
            if rule.after and event.process and rule.after(event):
                found += self._came_before(rule, event, seq)
        if event.kind == "run.ended" and event.run:
            found += self._ended(event.run)
        return found

    def feed_lines(self, lines: bytes) -> list[Match]:
        """Return the matches of lines of the log; what is of no interest is only glanced at."""
        found: list[Match] = []
        for line in lines.splitlines():
            try:
                glance = _GLANCE.decode(line)
                if glance.kind not in self.kinds:
                    continue
                gate, file = self._gates.get(glance.kind), glance.file
                if gate and not (file and (gate(plain(file.path)) or (file.target and gate(plain(file.target))))):
                    continue
                event = _KEPT.decode(line)
                found += self.feed(event, event.seq)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
        return found

    def memory(self) -> bytes:
        """Return what outlives a restart: which hosts, files and programs agents were seen with."""
        return msgspec.json.encode({agent: list(values) for agent, values in self._seen.items()})

    def restore(self, memory: bytes) -> None:
        """Take back what `memory` returned; what is none is forgotten, and agents are new again."""
        try:
            held = msgspec.json.decode(memory, type=dict[str, list[str]])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        for agent, values in list(held.items())[-AGENTS:]:
            self._seen[agent] = OrderedDict.fromkeys(values[-VALUES:])

    # --- several events ---------------------------------------------------------------------

    def _matched(self, rule: Compiled, event: Event, seq: int) -> Iterator[Match]:
        wanted = rule.rule
        if wanted.first and not self._is_first(wanted.first, event):
            return
        window = self._window(rule, f"@{event.agent}" if wanted.per == "agent" else event.run)
        seqs: tuple[int, ...] = (seq,)
        if rule.after:
            before = self._before(window, rule, event)
            if before is None:
                return
            seqs = (before, seq)
        if wanted.count > 1:
            subject = _subject(wanted.per, event)
            times = window.happened.get(subject)
            if times is None:
                times = window.happened[subject] = deque(maxlen=wanted.count)
                yield from self._bound(rule, window, window.happened, event, seq)
            window.happened.move_to_end(subject)
            times.append((event.time, seq))
            if len(times) < wanted.count or event.time - times[0][0] > rule.within_ns:
                return
            seqs = tuple(number for _, number in times)[-_SEQS:]
            times.clear()
        yield from self._tell(rule, window, event, seqs)

    def tick(self, now_ns: int) -> list[Match]:
        """Return what was held back and has waited long enough; call it about once a second."""
        found: list[Match] = []
        for window, rule in list(self._waiting.values()):
            if abs(now_ns - window.told_ns) >= rule.every_ns and window.last:
                found += self._tell(rule, window, *window.last, now_ns=now_ns)
        return found

    def _tell(
        self, rule: Compiled, window: _Window, event: Event, seqs: tuple[int, ...], *, now_ns: int = 0
    ) -> Iterator[Match]:
        """Yield a match, unless the run has had one just now; `now_ns` says that it has waited already."""
        if window.told_ns and not now_ns and abs(event.time - window.told_ns) < rule.every_ns:
            window.held_back += 1
            window.last = (event, seqs)
            self._waiting[id(window)] = (window, rule)
            return
        times = window.held_back + (0 if now_ns else 1)
        self._waiting.pop(id(window), None)
        window.held_back, window.last, window.told_ns = 0, None, now_ns or event.time
        yield Match(rule, event, seqs, times)

    def _came_before(self, rule: Compiled, event: Event, seq: int) -> Iterator[Match]:
        window = self._window(rule, event.run)
        subject = _subject("process", event)
        window.before[subject] = (event.time, seq)
        window.before.move_to_end(subject)
        yield from self._bound(rule, window, window.before, event, seq)

    def _before(self, window: _Window, rule: Compiled, event: Event) -> int | None:
        """Return the number of what came before, by the same process or the one that made it."""
        held = event.process
        if held is None:
            return None
        for subject in (_subject("process", event), held.parent_uid or str(held.parent_pid)):
            found = window.before.get(subject)
            if found and abs(event.time - found[0]) <= rule.within_ns:
                return found[1]
        return None

    def _bound(self, rule: Compiled, window: _Window, table: _Table, event: Event, seq: int) -> Iterator[Match]:
        """Keep a run within what it may have remembered; say once that it needed more."""
        if len(table) <= SUBJECTS:
            return
        table.popitem(last=False)
        if not window.limited:
            window.limited = True
            yield Match(rule, event, (seq,), reason="state-limit")

    def _window(self, rule: Compiled, run: str) -> _Window:
        windows = self._runs.get(run)
        if windows is None:
            windows = self._runs[run] = {}
            if len(self._runs) > RUNS:
                for gone in self._runs.popitem(last=False)[1].values():
                    self._waiting.pop(id(gone), None)
        self._runs.move_to_end(run)
        name = rule.rule.name
        found = windows.get(name)
        if found is None:
            found = windows[name] = _Window(OrderedDict(), OrderedDict())
        return found

    def _ended(self, run: str) -> Iterator[Match]:
        """Forget a run, and tell what was held back of it."""
        windows = self._runs.pop(run, {})
        rules = {rule.rule.name: rule for found in self._by_kind.values() for rule in found}
        for name, window in windows.items():
            self._waiting.pop(id(window), None)
            if window.last:
                yield Match(rules[name], *window.last, times=window.held_back, reason="run-ended")

    def _is_first(self, what: str, event: Event) -> bool:
        value = _value(what, event)
        if not value:
            return False
        values = self._seen.setdefault(event.agent, OrderedDict())
        self._seen.move_to_end(event.agent)
        if len(self._seen) > AGENTS:
            self._seen.popitem(last=False)
        known = f"{what} {value}"[:_LONGEST]
        new = known not in values
        values[known] = None
        values.move_to_end(known)
        if len(values) > VALUES:
            values.popitem(last=False)
        return new


class _Paths(msgspec.Struct, gc=False):
    path: str
    target: str = ""


class _Glance(msgspec.Struct, gc=False):
    kind: str
    file: _Paths | None = None


_GLANCE = msgspec.json.Decoder(_Glance)
_KEPT = msgspec.json.Decoder(Kept)


def _subject(per: str, event: Event) -> str:
    """Return what is counted apart."""
    if per == "process" and event.process:
        return event.process.uid or str(event.process.pid)
    return event.agent if per == "agent" else event.run


def _value(what: str, event: Event) -> str:
    if what == "host":
        return (event.endpoint.hostname or event.endpoint.ip).lower() if event.endpoint else ""
    if what == "path":
        return event.file.path if event.file else ""
    return event.process.path if event.process else ""
