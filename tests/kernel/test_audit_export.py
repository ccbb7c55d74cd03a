"""The export against real receivers: what arrives is what was sent, nobody else gets it, and nothing is lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from cloister.audit.chain import encode
from cloister.audit.event import File
from cloister.audit.formats import FORMATS
from cloister.audit.kinds import kinds
from cloister.host import audit_syslog
from cloister.host.audit_log import Log
from cloister.host.audit_syslog import Trust
from cloister.runs.audit_export import Export, here
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.audit_targets import SyslogTarget
from support.audit_samples import full
from support.cef_parser import parse as parse_cef
from support.cloister import BASE, User
from support.rsyslog import Rsyslog
from support.secure_server import TestAuthority
from support.syslog_parser import parse as parse_syslog

pytestmark = pytest.mark.kernel

_HOSTILE = "a\nb|c=d\\e]\x1b[2J\0\u2028\u202e 12 <110>1 CEF:0|x|"


class Kept:
    """A log with its keeper."""

    def __init__(self, folder) -> None:
        self.directory = str(folder / "audit")
        self.keeper = Keeper(Log(self.directory), str(folder / "key"), Rules())
        self.keeper.open()

    def put(self, events) -> None:
        """Record events."""
        self.keeper.put([encode(event) for event in events])

    def numbers(self):
        """Return the numbers of all lines."""
        return set(range(1, self.keeper.seq + 1))


@pytest.fixture
def log(tmp_path):
    """Give a log with its keeper."""
    kept = Kept(tmp_path)
    yield kept
    kept.keeper.close()


@pytest.fixture
def soon(monkeypatch):
    """Let what was sent over TCP count as arrived after a second and a half."""
    monkeypatch.setattr(audit_syslog, "SETTLE_S", 1.5)


@contextlib.contextmanager
def _receiver(folder, scheme, **more):
    receiver = Rsyslog(folder / "rsyslog", scheme, **more)
    try:
        yield receiver
    finally:
        receiver.stop()


@contextlib.contextmanager
def _exporting(folder, log, url, form="cef", trust=None):
    """Export in a thread, as the process does."""
    cursors = folder / "cursors"
    cursors.mkdir(exist_ok=True)
    export = Export(log.directory, str(cursors), url, SyslogTarget(url, form, trust or Trust()), here())
    ended = threading.Event()

    def run():
        while not ended.is_set():
            ended.wait(min(export.turn(time.monotonic()), 1.0))
        export.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield export
    finally:
        ended.set()
        thread.join(30)


def _sequence(message):
    """Return the number of the event in a message of CEF."""
    return int(parse_cef(parse_syslog(message)[3])[1]["externalId"])


def _all(numbers):
    """Return what asks whether all these events are among messages."""
    return lambda messages: {int(n) for m in messages for n in re.findall(rb"externalId=(\d+)", m)} >= numbers


def _trust(authority):
    return Trust(str(authority.file))


@pytest.mark.parametrize("scheme", ["udp", "tcp", "tls"])
def test_every_kind_arrives_as_it_was_sent(tmp_path, log, scheme):
    """Rsyslog gets an event of every kind, one message each, in order, which strict parsers of syslog and CEF take."""
    authority = TestAuthority(tmp_path / "ca")
    log.put([full(kind, message=_HOSTILE) for kind in kinds()])
    log.put([full("file.opened", file=File(path=f"/w/{_HOSTILE}"))])
    numbers = log.numbers()
    trust = _trust(authority)
    with (
        _receiver(tmp_path, scheme, authority=authority) as receiver,
        _exporting(tmp_path, log, receiver.url, trust=trust),
    ):
        messages = receiver.wait(_all(numbers))
    assert [_sequence(message) for message in messages] == sorted(numbers)
    parsed = [parse_cef(parse_syslog(message)[3]) for message in messages]
    assert {header[4] for header, _ in parsed} >= set(kinds())
    assert parsed[-1][1]["filePath"].startswith("/w/a\nb|c=d\\e]\\x1b[2J\\x00\\u2028\\u202e 12 <110>1 CEF:0|x|")


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"cef"}))
def test_other_formats_arrive_whole(tmp_path, log, form):
    """OCSF, the log's own lines and CEF 1 arrive as they were rendered; the log's lines byte for byte."""
    log.put([full("file.opened", file=File(path=_HOSTILE))])
    with _receiver(tmp_path, "tcp") as receiver, _exporting(tmp_path, log, receiver.url, form):
        messages = receiver.wait(lambda found: len(found) >= log.keeper.seq)
    text = parse_syslog(messages[-1])[3]
    if form == "json":
        with open(f"{log.directory}/0000000000000001.jsonl", "rb") as file:
            assert text == file.read().splitlines()[-1]
    elif form == "ocsf":
        assert json.loads(text)["file"]["path"] == _HOSTILE
    else:
        assert text.startswith(b"CEF:1|")


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_a_receiver_with_a_wrong_certificate_gets_nothing(tmp_path, log, wrong):
    """With TLS a receiver of another authority, or with another name, gets no event; it is said, and tried again."""
    authority = TestAuthority(tmp_path / "ca")
    trusted = TestAuthority(tmp_path / "other") if wrong == "authority" else authority
    log.put([full("file.opened")])
    name = "localhost" if wrong == "authority" else "elsewhere.example.org"
    with _receiver(tmp_path, "tls", authority=authority, name=name) as receiver:
        with _exporting(tmp_path, log, receiver.url, trust=_trust(trusted)) as export:
            deadline = time.monotonic() + 15
            while not export.news and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(1)
        assert receiver.received() == []
    assert "certificate verify failed" in export.news[0]
    assert export.arrived == 0


def test_a_receiver_that_asks_for_a_certificate_gets_ours(tmp_path, log):
    """With `certificate` a receiver that verifies its senders takes the events; without it, it gets none."""
    authority = TestAuthority(tmp_path / "ca")
    certificate, key = authority.certificate("sender")
    both = tmp_path / "sender.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    log.put([full("file.opened")])
    with _receiver(tmp_path, "tls", authority=authority, mutual=True) as receiver:
        with _exporting(tmp_path, log, receiver.url, trust=_trust(authority)) as export:
            deadline = time.monotonic() + 15
            while not export.news and time.monotonic() < deadline:
                time.sleep(0.1)
        assert export.news
        assert receiver.received() == []
        with _exporting(tmp_path, log, receiver.url, trust=Trust(str(authority.file), str(both))):
            receiver.wait(_all(log.numbers()))


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_nothing_is_lost_when_the_receiver_is_killed(tmp_path, log, soon, scheme):
    """A receiver is killed twice with events that it had not read: it has all in the end; numbers tell duplicates."""
    authority = TestAuthority(tmp_path / "ca")
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(_receiver(tmp_path, scheme, authority=authority))
        export = stack.enter_context(_exporting(tmp_path, log, receiver.url, trust=_trust(authority)))
        for _ in range(2):
            log.put([full("process.executed", message=f"{n}") for n in range(300)])
            time.sleep(0.7)
            receiver.pause()
            log.put([full("process.executed", message=f"not read {n}") for n in range(20)])
            time.sleep(0.9)  # its kernel has taken them, it has not
            receiver.stop()
            log.put([full("process.executed", message=f"away {n}") for n in range(300)])
            time.sleep(0.7)
            receiver.start()
        numbers = log.numbers()
        messages = receiver.wait(_all(numbers), 60)
        deadline = time.monotonic() + 20
        while not export.idle and time.monotonic() < deadline:
            time.sleep(0.1)
    found = {}
    for message in messages:
        with contextlib.suppress(ValueError):  # the one that it was writing when it was killed
            found.setdefault(_sequence(message), set()).add(message)
    assert set(found) == numbers
    assert all(len(same) == 1 for same in found.values()), "a duplicate differs from what it repeats"
    assert export.arrived == log.keeper.seq
    assert any("do not reach" in word for word in export.news)
    assert any("is reached again" in word for word in export.news)


def test_a_killed_exporter_goes_on_where_it_was(tmp_path, log, soon):
    """After SIGKILL in the middle the next process sends the rest; what arrived long ago is not sent again."""
    words = [sys.executable, "-m", "cloister.services.audit_export", "--log", log.directory]
    with _receiver(tmp_path, "udp") as receiver:
        words += ["--cursors", str(tmp_path / "cursors"), "--syslog", receiver.url]
        log.put([full("file.opened") for _ in range(40)])  # no more than a socket's buffer holds: UDP loses the rest
        first = subprocess.Popen(words)
        try:
            receiver.wait(_all(log.numbers()))
            time.sleep(1.5)  # the cursor is written once a second
        finally:
            first.kill()
            first.wait()
        log.put([full("file.opened") for _ in range(20)])
        second = subprocess.Popen(words)
        try:
            messages = receiver.wait(_all(log.numbers()))
        finally:
            second.send_signal(signal.SIGTERM)
            assert second.wait(20) == 0
    assert [_sequence(message) for message in messages] == sorted(log.numbers())


def test_two_processes_do_not_send_the_same_log(tmp_path, log):
    """The second process of the same log ends, and says why."""
    words = [sys.executable, "-m", "cloister.services.audit_export", "--log", log.directory]
    words += ["--cursors", str(tmp_path), "--syslog", "udp://127.0.0.1:9"]
    first = subprocess.Popen([*words, "--lifeline"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "lock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        second = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert (second.returncode, "audit-export-runs" in second.stderr) == (75, True)
    finally:
        first.terminate()
        first.communicate(timeout=30)


def test_rotation_and_compression_do_not_matter(tmp_path, log):
    """Segments end and are compressed while they are sent: every line arrives, once and in order.

    By TCP: a receiver that is given no time loses what its socket does not hold by UDP (93 of such lines).
    """
    with _receiver(tmp_path, "tcp") as receiver, _exporting(tmp_path, log, receiver.url):
        log.keeper.wake()
        for _ in range(5):
            log.put([full("file.opened") for _ in range(40)])
            log.keeper.rotate()
            time.sleep(0.1)
        messages = receiver.wait(_all(log.numbers()))
    assert [_sequence(message) for message in messages] == sorted(log.numbers())


def test_a_long_log_is_not_thrown_at_a_receiver_by_udp(monkeypatch):
    """A receiver that reads only while the sender waits gets 3,000 events of a log: its socket holds 90 of them."""
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.setblocking(False)
    clock, found = [100.0], []

    def drain():
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(receiver.recv(4096))

    def sleep(seconds):
        clock[0] += seconds
        drain()

    monkeypatch.setattr(audit_syslog, "time", types.SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    wire = audit_syslog.Datagrams("127.0.0.1", receiver.getsockname()[1])
    for number in range(3000):
        wire.send(number, b"%04d" % number + b"x" * 1500)
    drain()
    wire.close()
    receiver.close()
    assert [int(message[:4]) for message in found] == list(range(3000))
    assert 3000 / (clock[0] - 100) <= audit_syslog.PACE_PER_S * 1.02


def test_the_journal_gets_fields_that_an_agent_cannot_forge(tmp_path):
    """An entry for the journal has the fields of ours only, whatever stands in the names of an event."""
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.bind(str(tmp_path / "socket"))
    from cloister.audit import cef, syslog
    from support.audit_samples import ORIGIN, recorded

    local = audit_syslog.Local(journal=str(tmp_path / "socket"))
    record = recorded(full("file.opened", run="x\nPRIORITY=0", message="\nMESSAGE=fake"))
    local.send(7, syslog.journal_entry(record, ORIGIN, cef.render))
    fields, rest = {}, journal.recv(65536)
    while rest:
        name, _, rest = rest.partition(b"\n")
        length = int.from_bytes(rest[:8], "little")
        assert name not in fields
        fields[name], rest = rest[8 : 8 + length], rest[9 + length :]
    assert (fields[b"PRIORITY"], fields[b"SYSLOG_IDENTIFIER"]) == (b"6", b"cloister")
    assert fields[b"CLOISTER_RUN"] == b"x\\x0aPRIORITY=0"
    assert parse_cef(fields[b"MESSAGE"])[1]["msg"] == "\nMESSAGE=fake"
    local.close()
    journal.close()


def test_a_policy_with_a_receiver_is_all_it_takes(tmp_path, user: User, workspace: Path):
    """With `[audit] syslog` a run's events arrive, to the end of the log; who sends them ends with the broker."""
    with _receiver(tmp_path, "udp") as receiver:
        user.write_policy(f'{BASE}\n[audit]\nsyslog = "{receiver.url}"\n')
        done = user.inside("true", cwd=workspace)
        assert done.returncode == 0, done.stderr
        messages = receiver.wait(lambda found: any(b"|run.ended|" in message for message in found))
        kinds_found = {parse_cef(parse_syslog(message)[3])[0][4] for message in messages}
        assert {"run.started", "run.ended"} <= kinds_found
        run = user.receipts()[0]["id"]
        assert any(parse_cef(parse_syslog(message)[3])[1].get("cs1") == run for message in messages)
        user.close()
        messages = receiver.wait(lambda found: any(b"|log.closed|" in message for message in found))
        _ended(user.state / "audit-export/lock")


def _ended(lock: Path) -> None:
    """Wait until the process that sends has ended: its lock is free."""
    deadline = time.monotonic() + 20
    with lock.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the process that sends outlives its broker"
                time.sleep(0.1)
            else:
                return


def test_export_prints_and_sends(tmp_path, user: User, workspace: Path):
    """`cloister audit export` prints one line for each event that is asked for; --to sends the same."""
    user.write_policy(BASE)
    user.inside("true", cwd=workspace)
    lines = user.run("audit", "export", "--own", cwd=workspace).stdout.splitlines()
    kinds_found = [json.loads(line)["kind"] for line in lines]
    assert "run.started" in kinds_found
    for form in ("ocsf", "syslog", "otlp"):
        printed = user.run("audit", "export", "--own", "--kind", "run.started", "--format", form, cwd=workspace).stdout
        assert len(printed.splitlines()) == kinds_found.count("run.started"), form
    with _receiver(tmp_path, "udp") as receiver:
        words = ("audit", "export", "--own", "--to", receiver.url, "--format", "cef", "--kind", "run")
        sent = user.run(*words, cwd=workspace)
        assert sent.returncode == 0, sent.stderr
        receiver.wait(lambda found: len(found) >= sum(kind.startswith("run.") for kind in kinds_found))
    refused = user.run("audit", "export", "--own", "--to", "tcp://127.0.0.1:1", cwd=workspace)
    assert (refused.returncode, "export-failed" in refused.stderr) == (75, True)
    wrong = user.run("audit", "export", "--own", "--to", "gopher://x", cwd=workspace)
    assert (wrong.returncode, "receiver-invalid" in wrong.stderr) == (64, True)


class Noted:
    """A receiver that notes what it gets, and fails when it is told to."""

    def __init__(self) -> None:
        self.arrived, self.complaints, self.items, self.broken = 0, [], [], ""

    def put(self, items, origin):
        """Take lines."""
        if self.broken:
            raise OSError(self.broken)
        self.items += [(origin.log, item.record.seq) for item in items]
        self.arrived = items[-1].record.seq

    def look(self):
        """Nothing."""

    def close(self):
        """Nothing."""


def _turns(export, count=6):
    return [export.turn(time.monotonic()) for _ in range(count)]


def test_what_retention_removed_before_it_was_sent_is_told(tmp_path, log):
    """A receiver that was away for longer than events are kept: how many it missed is said, the rest arrives."""
    target = Noted()
    export = Export(log.directory, str(tmp_path), "x", target, here())
    log.put([full("file.opened") for _ in range(10)])
    _turns(export)
    had = log.keeper.seq
    log.put([full("file.opened") for _ in range(10)])
    export.close()
    log.keeper.wake()
    log.keeper.rotate()
    last = log.keeper.seq
    first = int(max(Path(log.directory).glob("*.jsonl*")).name.partition(".")[0])
    deadline = time.monotonic() + 30
    while len(list(Path(log.directory).glob("*.jsonl"))) > 1:  # its thread compresses what is closed
        assert time.monotonic() < deadline, "nothing is compressed"
        time.sleep(0.01)
    for path in Path(log.directory).glob("*.jsonl.gz"):
        if int(path.name.partition(".")[0]) < first:
            path.unlink()
    again = Export(log.directory, str(tmp_path), "x", target, here())
    _turns(again)
    assert again.arrived == last
    assert again.news == [f"{first - 1 - had} events were removed before x had them"]


def test_another_log_begins_from_its_beginning(tmp_path, log):
    """A log that was replaced by a new one is sent from its first line, under its own id."""
    target = Noted()
    export = Export(log.directory, str(tmp_path), "x", target, here())
    log.put([full("file.opened") for _ in range(30)])
    _turns(export)
    export.close()
    other = Kept(tmp_path / "other")
    other.put([full("file.opened")])
    target.items.clear()
    again = Export(other.directory, str(tmp_path), "x", target, here())
    _turns(again)
    other.keeper.close()
    assert target.items == [(other.keeper.log_id, 1), (other.keeper.log_id, 2)]


def test_a_cursor_that_is_lost_or_broken_means_duplicates_only(tmp_path, log):
    """Without a cursor file, or with one that is no JSON, everything is sent again."""
    log.put([full("file.opened")])
    for text in (None, b"", b"\0\0\0", b'{"seq":"x"}'):
        for path in tmp_path.glob("*.json"):
            path.unlink() if text is None else path.write_bytes(text)
        target = Noted()
        export = Export(log.directory, str(tmp_path), "x", target, here())
        _turns(export)
        export.close()
        assert [seq for _, seq in target.items] == [1, 2]


def test_damage_in_the_log_hides_nothing(tmp_path, log):
    """Lines that are none, and one with a number from the future, are sent or counted; what is whole arrives."""
    log.put([full("file.opened")])
    with open(f"{log.directory}/0000000000000001.jsonl", "ab") as file:
        forged = b'{"seq":999999,"time":1,"kind":"file.opened","hash":"%s"}' % (b"a" * 64)
        file.write(b'{"seq":3,"garbage\n\x00\xff\n{"seq":4}\n' + forged + b"\n")
    log.put([full("file.opened")])
    target = Noted()
    export = Export(log.directory, str(tmp_path), "x", target, here())
    _turns(export)
    assert [seq for _, seq in target.items] == [1, 2, 999999, 3]
    assert export.unreadable == 3


def test_a_log_that_was_cut_is_told(tmp_path, log):
    """A log that ends before what a receiver has was rolled back: that is said, and what follows is sent."""
    log.put([full("file.opened") for _ in range(5)])
    export = Export(log.directory, str(tmp_path), "x", Noted(), here())
    _turns(export)
    export.close()
    path = Path(f"{log.directory}/0000000000000001.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    target = Noted()
    again = Export(log.directory, str(tmp_path), "x", target, here())
    _turns(again)
    assert again.news == ["the log ends at 3, x has 6: cloister audit verify"]
    assert [seq for _, seq in target.items] == [1, 2, 3]


def test_a_receiver_that_fails_is_asked_ever_more_seldom(tmp_path, log):
    """Waits grow to a minute; trouble and its end are told once each; nothing is left out."""
    target = Noted()
    target.broken = "out of order"
    log.put([full("file.opened")])
    export = Export(log.directory, str(tmp_path), "x", target, here())
    waits = _turns(export, 12)
    assert waits[0] <= 1
    assert 40 <= waits[-1] <= 60
    target.broken = ""
    _turns(export)
    assert [word.partition(":")[0] for word in export.news] == ["events do not reach x", "x is reached again"]
    assert [seq for _, seq in target.items] == [1, 2]
