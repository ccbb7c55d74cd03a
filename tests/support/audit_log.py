"""Logs of the audit for tests and benchmarks: chained segments as their keeper writes them, and what happens in them.

Not the keeper: no signature, no rotation by time, and heads only where asked for. The form of a line and the chain are
those of ARCHITECTURE, "The audit".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from cloister.audit.event import Endpoint, Event, File, Http, Model, Process
from cloister.host.audit_files import segment_name
from cloister.host.audit_pack import pack

START_NS = 1_790_000_000_000_000_000
LOG_ID = "0123456789abcdef0123456789abcdef"
AGENTS = ("claude", "pi", "codex", "openclaw")
USERS = ("alice", "bob", "carol")
HOSTS = ("api.anthropic.com", "github.com", "registry.example.org", "pypi.example.net", "tracker.example.com")
PROGRAMS = ("/usr/bin/node", "/usr/bin/git", "/usr/bin/bash", "/usr/bin/python3.11", "/usr/bin/rg")


class Writer:
    """Writes events as chained lines, a new segment after so many."""

    def __init__(self, directory: Path, *, per_segment: int = 100_000, first: int = 1) -> None:
        """Begin a log in a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.per_segment = per_segment
        self.seq = first
        self._hash = hashlib.sha256(b"cloister-audit-v1" + LOG_ID.encode()).digest()
        self._file = None
        self._left = 0

    def write(self, events: Iterable[Event]) -> None:
        """Add events."""
        encode = msgspec.json.Encoder().encode
        self.write_fields(encode(event)[1:-1] for event in events)

    def write_fields(self, bodies: Iterable[bytes]) -> None:
        """Add events that are encoded already, without their braces."""
        lines: list[bytes] = []
        for body in bodies:
            if not self._left:
                self._flush(lines)
                self._open()
            head = b'{"seq":%d,%s' % (self.seq, body)
            self._hash = hashlib.sha256(self._hash + head).digest()
            lines.append(b'%s,"hash":"%s"}\n' % (head, self._hash.hex().encode()))
            self.seq += 1
            self._left -= 1
            if len(lines) >= 4096:
                self._flush(lines)
        self._flush(lines)
        if self._file:
            self._file.flush()

    def rotate(self) -> None:
        """Close the segment; the next event opens another."""
        self._left = 0

    def _flush(self, lines: list[bytes]) -> None:
        if lines and self._file:
            self._file.write(b"".join(lines))
        lines.clear()

    def _open(self) -> None:
        if self._file:
            self._file.close()
        self._file = (self.directory / segment_name(self.seq)).open("wb")
        self._left = self.per_segment


def pack_segment(path: Path) -> Path:
    """Pack a closed segment as its keeper does: beside it, then in its place."""
    packed = path.with_name(f"{path.name}.gz")
    with path.open("rb") as plain, packed.open("wb") as file:
        file.writelines(pack(plain))
    path.unlink()
    return packed


def run_ids(count: int) -> list[str]:
    """Return ids as runs have them."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    dice = random.Random(7)  # noqa: S311  # the same ids each time
    return ["1" + "".join(dice.choice(alphabet) for _ in range(11)) for _ in range(count)]


def busy_day(count: int, *, seed: int = 1, runs: int = 40) -> Iterator[bytes]:
    """Yield the bodies of many events, quickly: agents that build, search and talk, several at a time.

    Of a million events some 60 % are files, 25 % processes, 10 % connections, the rest models and what is rare.
    """
    dice = random.Random(seed)  # noqa: S311  # the same day each time
    ids = run_ids(runs)
    below = max(10, min(count // 20, 300_000))
    for number in range(count):
        run = ids[(number * runs // count + int(dice.random() * 8)) % runs]
        who = f'"run":"{run}","agent":"{AGENTS[ord(run[2]) % 4]}","user":"{USERS[ord(run[3]) % 3]}"'
        pid = 1000 + int(dice.random() * 4000)
        what = _happening(dice.random(), pid, int(below * dice.random() ** 3))
        yield f'"time":{START_NS + number * 400_000},{what[0]},{who},{what[1]}'.encode()


def _happening(place: float, pid: int, file: int) -> tuple[str, str]:
    """Return the kind of an event, and what of it is its own."""
    uid = f"{pid * 0x9E3779B97F4A7C15:032x}"
    process = f'"process":{{"pid":{pid},"uid":"{uid}","name":"node","path":"{PROGRAMS[pid % 5]}"}}'
    if place < 0.6:
        kind = "file.opened" if place < 0.55 else "file.created"
        path = f"/home/alice/src/app/node_modules/pkg{file // 40}/lib/file{file}.js"
        held = f'"file":{{"path":"{path}","resolved":true,"flags":524288}}'
        return f'"kind":"{kind}"', f'{process},{held},"tier":"lsm","source":"sensor"'
    if place < 0.85:
        kind = ("process.forked", "process.executed", "process.exited")[int(place * 1000) % 3]
        return f'"kind":"{kind}"', f'{process},"tier":"tracepoint","source":"sensor"'
    if place < 0.95:
        decided = "blocked" if place < 0.86 else "allowed"
        host = HOSTS[file % 5]
        other = f'"endpoint":{{"hostname":"{host}","ip":"198.51.100.{pid % 250}","port":443,"protocol":"tls"}}'
        return '"kind":"egress.decided"', f'"disposition":"{decided}",{other},"bytes_up":{pid},"source":"broker"'
    if place < 0.999:
        model = f'"model":{{"provider":"anthropic","name":"claude-opus","tokens":{pid},"cost_usd":0.0125}}'
        return '"kind":"model.called"', f'{model},"duration_ns":{pid * 1_000_000},"source":"broker"'
    return '"kind":"process.traced"', f'{process},"severity_id":3,"source":"sensor"'


def small_day(run: str = "1aaaaaaaaaaa") -> list[Event]:
    """Return one run with something of everything, in order."""
    shell = Process(pid=41, uid="a" * 32, name="bash", path="/usr/bin/bash", cmd_line=("bash", "-c", "make"))
    make = Process(
        pid=42, uid="b" * 32, name="make", path="/usr/bin/make", cmd_line=("make",), parent_uid="a" * 32, parent_pid=41
    )
    github = Endpoint(hostname="github.com", ip="198.51.100.7", port=443, protocol="tls")
    private = Endpoint(hostname="10.0.0.1", ip="10.0.0.1", port=22, protocol="tcp")
    makefile = File(path="/home/alice/src/app/Makefile", resolved=True)
    key = File(path="/home/alice/.ssh/id_ed25519", resolved=True)
    opus = Model(provider="anthropic", name="claude-opus", tokens=4200, cost_usd=0.031)

    def at(ms: int, kind: str, **fields: object) -> Event:
        moment = START_NS + ms * 1_000_000
        return Event(time=moment, kind=kind, run=run, agent="claude", user="alice", **fields)  # type: ignore[arg-type]

    return [
        at(0, "run.started", policy="ab" * 32, plan="cd" * 32, source="broker"),
        at(5, "process.executed", process=shell, tier="tracepoint", source="sensor"),
        at(9, "process.executed", process=make, tier="tracepoint", source="sensor"),
        at(10, "file.opened", process=make, file=makefile),
        at(11, "file.opened", process=make, file=key, error=13, severity_id=4),
        at(20, "egress.decided", disposition="allowed", endpoint=github, bytes_up=1200, duration_ns=140_000_000),
        at(22, "egress.decided", disposition="blocked", reason="private-address", endpoint=private),
        at(
            30, "egress.request", disposition="allowed", endpoint=github, http=Http(method="GET", path="/c", status=200)
        ),
        at(31, "credential.used", credential="github", endpoint=github),
        at(50, "model.called", model=opus, duration_ns=2_100_000_000),
        at(60, "process.exited", process=make),
        at(90, "run.ended", reason="exited", duration_ns=90_000_000, source="broker"),
    ]
