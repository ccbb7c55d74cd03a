"""Detections over several events: counting, order, holding back, bounds; and what a policy may say of rules."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cloister.audit.chain import Chain, encode
from cloister.audit.detect import RUNS, SUBJECTS, Detector, Match
from cloister.audit.detect_rules import compiled, rules_of
from cloister.audit.event import Endpoint, Event, File, Process
from cloister.errors import PolicyError
from cloister.policy.load import load
from cloister.policy.model import Audit, Conditions, DetectionRule

S = 1_000_000_000
T = 1_790_000_000 * S


def event(kind: str, at: float = 0.0, run: str = "1aaaaaaaaaaa", **fields: Any) -> Event:
    """Return an event."""
    return Event(time=T + int(at * S), kind=kind, run=run, agent=fields.pop("agent", "claude"), **fields)


def detector(**rule: Any) -> Detector:
    """Return a detector with one rule."""
    return Detector([compiled(DetectionRule(**{"name": "r", "kinds": ("file.opened",), **rule}))])


def fed(held: Detector, events: list[Event]) -> list[Match]:
    """Return the matches of events."""
    return [found for seq, one in enumerate(events, 1) for found in held.feed(one, seq)]


def test_a_count_is_of_one_run_and_names_its_events() -> None:
    """Three within the time match, with their numbers; spread over two runs they do not."""
    held = detector(count=3, within="10s")
    spread = [event("file.opened", at, run=f"1aaaaaaaaaa{at % 2}") for at in range(4)]

    assert not fed(held, spread)
    assert [
        found.seqs for found in fed(detector(count=3, within="10s"), [event("file.opened", at) for at in (0, 1, 2)])
    ] == [(1, 2, 3)]
    assert not fed(detector(count=3, within="10s"), [event("file.opened", at) for at in (0, 6, 12)])


def test_counting_for_an_agent_goes_over_its_runs() -> None:
    """`per = "agent"` counts runs of one agent together, and not those of another."""
    held = detector(count=2, per="agent")
    mine = [event("file.opened", at, run=f"1aaaaaaaaaa{at}") for at in (0, 1)]
    others = [event("file.opened", at, run=f"1bbbbbbbbbb{at}", agent=f"a{at}") for at in (0, 1)]

    assert not fed(held, others)
    assert len(fed(held, mine)) == 1


def test_repetitions_are_held_back_and_told_with_their_number() -> None:
    """One match in `every`; the rest comes with the tick after it, or when the run ends, counted."""
    held = detector(every="1m")

    assert len(fed(held, [event("file.opened", at) for at in (0, 1, 2)])) == 1
    assert not held.tick(T + 30 * S)
    late = held.tick(T + 61 * S)
    assert [(found.times, found.event.time) for found in late] == [(2, T + 2 * S)]
    assert not held.tick(T + 200 * S)
    fed(held, [event("file.opened", 300), event("file.opened", 301)])
    assert [(found.times, found.reason) for found in fed(held, [event("run.ended", 302)])] == [(1, "run-ended")]


def test_a_hostile_run_cannot_make_the_state_grow_nor_push_out_others() -> None:
    """A run that needs more than its part loses its own oldest, and is told of; another run's state stays."""
    rule = {"kinds": ("process.executed",), "after": Conditions(kinds=("network.connected",))}
    held = detector(**rule)
    who = Process(pid=1, uid="victim")
    held.feed(event("network.connected", run="1other", process=who, endpoint=Endpoint(ip="203.0.113.1")), 1)
    flood = [
        event("network.connected", process=Process(pid=n, uid=f"u{n}"), endpoint=Endpoint(ip="203.0.113.2"))
        for n in range(SUBJECTS * 3)
    ]
    found = fed(held, flood)

    assert [one.reason for one in found] == ["state-limit"]
    assert len(held._runs["1aaaaaaaaaaa"]["r"].before) == SUBJECTS
    assert fed(held, [event("process.executed", 1, run="1other", process=who)])


def test_many_runs_do_not_make_the_state_grow() -> None:
    """Runs beyond the bound are forgotten, oldest first; what they held back is no longer waited for."""
    held = detector(every="1m")
    for number in range(RUNS * 2):
        for at in (0, 1):
            held.feed(event("file.opened", at, run=f"{number}"), number)

    assert len(held._runs) == RUNS
    assert len(held._waiting) <= RUNS


def test_what_was_seen_outlives_a_restart() -> None:
    """A host that an agent was seen with is not new to the next keeper; a broken memory makes it new again."""
    rule = {"kinds": ("egress.decided",), "first": "host"}
    first = event("egress.decided", endpoint=Endpoint(hostname="A.example.com"))
    again = event("egress.decided", 100, run="1bbbbbbbbbbb", endpoint=Endpoint(hostname="a.example.com"))
    held = detector(**rule)
    assert len(fed(held, [first, again])) == 1
    later, broken = detector(**rule), detector(**rule)
    later.restore(held.memory())
    broken.restore(b'{"claude": 7')

    assert not fed(later, [again])
    assert len(fed(broken, [again])) == 1


@pytest.mark.parametrize(
    "path", ["/home/al/./.ssh//id_rsa", "/home/al/x/../.ssh/id_rsa", "/" + "d/" * 3000 + ".ssh/id_rsa"]
)
def test_detours_of_a_path_do_not_hide_it(path: str) -> None:
    """What is asked for by dots, doubled slashes or a very long way is seen as what it is."""
    held = detector(paths=(".ssh/id_*",), every="1s")
    chain = Chain("0" * 32)
    line = chain.line(encode(event("file.opened", file=File(path=path))))

    assert fed(held, [event("file.opened", 60, file=File(path=path))])
    assert held.feed_lines(line)


def test_a_hostile_text_costs_no_more_than_a_long_one() -> None:
    """No path or command line makes a rule look at it again and again."""
    rules = rules_of(Audit())
    held = Detector(rules)
    words = ("socket" * 300, "import socket " * 200, "nc " * 700, "fsockopen" * 200)
    paths = ("/.mozilla/firefox" * 120, "/.config/gcloud/credential" * 80, "/" * 4000, "/.ssh/id_" * 400 + "/x\n")
    began = time.process_time()
    for number in range(50):
        for text in words:
            process = Process(pid=1, path="/usr/bin/python3", cmd_line=(f"{number}{text}",))
            held.feed(event("process.executed", process=process), 1)
        for path in paths:
            held.feed(event("file.opened", file=File(path=f"/{number}{path}")), 1)

    assert time.process_time() - began < 2.0  # 400 events; one that backtracks takes seconds alone


def test_lines_bring_what_their_events_bring() -> None:
    """Fed with lines of the log, a detector finds the same; half a line and noise are passed over."""
    chain = Chain("0" * 32)
    lines = chain.lines(
        [encode(event("run.started")), encode(event("file.opened", 1)), encode(event("file.deleted", 2))]
    )
    found = detector().feed_lines(b'{"seq":\n\xff\xfe\n' + lines + b'{"kind":"file.opened"')

    assert [one.seqs for one in found] == [(2,)]


def test_a_match_is_an_event_that_names_what_made_it() -> None:
    """It has severity, rule, run and the numbers of its events, and is itself no event that rules are about."""
    held = detector(severity="critical", action="stop", title="bad")
    told = fed(held, [event("file.opened", process=Process(pid=3, name="x"))])[0].as_event(T, "auditd")

    assert (told.kind, told.severity_id, told.rule, told.run) == ("detection.matched", 5, "r", "1aaaaaaaaaaa")
    assert told.details == {"action": "stop", "events": "1", "of": "file.opened"}
    assert told.message.startswith("bad: x[3]")
    assert not held.feed(told, 9)


def test_a_policy_adds_rules_and_changes_what_becomes_of_others() -> None:
    """Rules of a policy come besides; one that comes with Cloister can be switched off or made to stop the run."""
    text = """
schema = 1
[audit]
detections = { fork-flood = "off", reverse-shell = "stop" }
[[audit.rules]]
name = "prod-database"
severity = "high"
action = "stop"
kinds = ["egress"]
hosts = ["*.prod.example.com"]
[[audit.rules]]
name = "curl-then-run"
kinds = ["process.executed"]
programs = ["/tmp/*"]
after = { kinds = ["file.created"], paths = ["/tmp/*"] }
"""
    rules = {one.rule.name: one for one in rules_of(load(text.encode(), "cloister.toml").audit)}

    assert "fork-flood" not in rules
    assert rules["reverse-shell"].rule.action == "stop"
    held = Detector([rules["prod-database"]])
    assert held.feed(event("egress.decided", endpoint=Endpoint(hostname="db.prod.example.com")), 1)
    assert not held.feed(event("egress.decided", endpoint=Endpoint(hostname="db.test.example.com")), 2)


@pytest.mark.parametrize(
    ("audit", "words"),
    [
        (Audit(detections={"reverse-shel": "off"}), "did you mean reverse-shell"),
        (Audit(rules=(DetectionRule(name="x", kinds=("file.open",)),)), "did you mean file.opened"),
        (Audit(rules=(DetectionRule(name="x"),)), "which events"),
        (Audit(rules=(DetectionRule(name="No Name", kinds=("file",)),)), "a name begins"),
        (Audit(rules=(DetectionRule(name="fork-flood", kinds=("file",)),)), "already"),
        (Audit(rules=(DetectionRule(name="x", kinds=("file",), within="soon"),)), "a duration"),
        (Audit(rules=(DetectionRule(name="x", kinds=("detection",)),)), "not about detections"),
        (Audit(rules=(DetectionRule(name="x", kinds=("file",), paths=("",)),)), "1 to 512"),
        (Audit(rules=(DetectionRule(name="x", kinds=("file",), after=Conditions(kinds=("fi",))),)), "rules[0].after"),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_with_its_place(audit: Audit, words: str) -> None:
    """Every mistake of a rule is named with where it stands and what to write."""
    with pytest.raises(PolicyError) as caught:
        rules_of(audit)

    assert words in str(caught.value.problems)
