"""The system's keeper as a process: who may say what, how much, and what it does when it cannot write."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.audit.chain import encode
from cloister.audit.event import Event
from cloister.host.audit_send import COUNT, HEADER, Sender
from cloister.runs.audit_door import Door
from cloister.runs.audit_sinks import SystemSink
from cloister.runs.audit_verify import verify

pytestmark = pytest.mark.kernel


class Daemon:
    """A keeper in a directory of the test's."""

    def __init__(self, place: Path, *words: str) -> None:
        """Start it and wait until it listens."""
        self.place, self.socket = place, str(place / "audit.sock")
        self._words = words
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start a keeper; the one before must be dead."""
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"cl-audit-{os.getpid()}-{time.monotonic_ns()}"
        notify.bind(f"\0{name}")
        notify.settimeout(20)
        command = [sys.executable, "-m", "cloister.services.auditd", "--socket", self.socket, "--log",
                   str(self.place / "log"), "--keys", str(self.place / "key"), *self._words]  # fmt: skip
        self.process = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": f"@{name}"})
        assert notify.recv(100) == b"READY=1"
        notify.close()
        return self.process

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        self.process.send_signal(number)
        self.process.wait(10)

    def events(self) -> list[dict[str, Any]]:
        """Return what is in the open segments."""
        paths = sorted((self.place / "log").glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start keepers; they are ended afterwards."""
    begun: list[Daemon] = []

    def one(*words: str) -> Daemon:
        begun.append(Daemon(tmp_path, *words))
        return begun[-1]

    yield one
    for daemon in begun:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGCONT)
            daemon.end(signal.SIGKILL)


def warned(number: int = 0, **fields: Any) -> bytes:
    """Return an event that any user may report."""
    return encode(Event(time=time.time_ns(), kind="run.warned", run="0" * 12, message=str(number), **fields))


def test_what_is_confirmed_is_in_the_log(start: Callable[..., Daemon]) -> None:
    """Events arrive in order, stamped with the reporter by the kernel's word; the closed log verifies."""
    daemon = start()
    sender = Sender(daemon.socket)
    sender.send([warned(number, user="root", source="hostd", account="x") for number in range(3000)])
    found = [event for event in daemon.events() if event["kind"] == "run.warned"]
    assert [event["message"] for event in found] == [str(number) for number in range(3000)]
    assert {event["reporter_uid"] for event in found} == {os.getuid()}
    if os.getuid() != 0:
        assert {(event["source"], "account" in event) for event in found} == {("broker", False)}
        assert "root" not in {event["user"] for event in found}
    daemon.end()
    report = verify(str(daemon.place / "log"))
    assert report.good, report.findings
    assert report.ending == "closed"


@pytest.mark.skipif(os.getuid() == 0, reason="root may report for others")
def test_a_user_cannot_say_what_is_the_systems_to_say(start: Callable[..., Daemon]) -> None:
    """Kernel events, hostd's requests, heads and detections of a user are dropped and counted, with the reason."""
    daemon = start()
    sender = Sender(daemon.socket)
    for kind in ("file.opened", "hostd.request", "log.head", "log.closed", "detection.matched", "nothing.known"):
        sender.send([encode(Event(time=1, kind=kind))])
        time.sleep(1.05)
    sender.send([warned(), encode(Event(time=1, kind="process.executed", tier="lsm"))])
    kinds = [event["kind"] for event in daemon.events()]
    assert kinds.count("log.lost") == 6
    assert kinds.count("run.warned") == 1
    told = [event["tier"] for event in daemon.events() if event["kind"] == "process.executed"]
    assert told == ["seccomp"], "what a sandbox tells is never the kernel's word"
    assert not {"file.opened", "hostd.request", "nothing.known", "log.closed"} & set(kinds)
    assert {event["kind"] for event in daemon.events() if "reporter_uid" in event} == {
        "log.lost", "run.warned", "process.executed"
    }  # fmt: skip
    assert all(event["details"].get("key") for event in daemon.events() if event["kind"] == "log.head")


def test_hostile_clients_trouble_nobody_else(start: Callable[..., Daemon]) -> None:
    """Rubbish, endless frames, floods of connections, silence and refused reading: another's events still arrive."""
    daemon = start()
    honest = Sender(daemon.socket) if os.getuid() == 0 else None
    held = []
    for data in (b"\xff" * 64, HEADER.pack(1 << 30, ord("E")), HEADER.pack(4, ord("Z")) + b"zzzz",
                 HEADER.pack(9, ord("E")),
                 HEADER.pack(3, ord("E")) + b"{}\n", HEADER.pack(60, ord("E")) + b"[" * 60):  # fmt: skip
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(daemon.socket)
        sock.sendall(data)
        held.append(sock)
    passing, other = os.pipe()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(daemon.socket)
    socket.send_fds(sock, [HEADER.pack(0, ord("E"))], [passing, other])  # descriptors that nobody asked for
    held.append(sock)
    unread = socket.socket(socket.AF_UNIX)
    unread.connect(daemon.socket)
    unread.setblocking(False)
    with contextlib.suppress(OSError):  # it is full, or was closed
        for _ in range(3_000_000):
            unread.send(HEADER.pack(0, ord("E")))
    unread.close()
    flood = [socket.socket(socket.AF_UNIX) for _ in range(60)]
    for one in flood:
        one.connect(daemon.socket)
    time.sleep(0.3)
    before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    for one in (*held, *flood):
        one.close()
    (honest or Sender(daemon.socket)).send([warned(7)])
    assert before < 40 or os.getuid() == 0, "a user has a bounded number of connections"
    assert [event["message"] for event in daemon.events() if event["kind"] == "run.warned"] == ["7"]


@pytest.mark.skipif(os.getuid() == 0, reason="root has no share")
def test_a_flood_is_cut_and_counted_and_hides_no_end_of_a_run(start: Callable[..., Daemon]) -> None:
    """More than a user's share is dropped, exactly counted as an event, and what matters most still comes through."""
    daemon = start()
    sender = Sender(daemon.socket, timeout_s=30)
    flood = [encode(Event(time=1, kind="egress.decided", run="0" * 12)) for _ in range(30_000)]
    sender.send(flood)
    sender.send([encode(Event(time=1, kind="run.ended", run="0" * 12))])
    time.sleep(1.2)
    sender.send()
    found = daemon.events()
    lost = sum(event["count"] for event in found if event["kind"] == "log.lost")
    kept = sum(event["kind"] == "egress.decided" for event in found)
    assert kept + lost == 30_000
    assert 20_000 <= kept < 29_000
    assert sum(event["kind"] == "run.ended" for event in found) == 1


def test_a_door_outlives_a_killed_keeper_without_a_loss(start: Callable[..., Daemon]) -> None:
    """Kill -9 and a new keeper while events come: none is missing, trouble is not called, the log verifies."""
    daemon = start()
    trouble: list[str] = []
    door = Door(lambda: SystemSink(daemon.socket), on_trouble=trouble.append)
    for number in range(3000):
        door.put("lost", "broker", 1.0, number + 1, "test")
        if number % 1000 == 500:
            time.sleep(0.05)
            daemon.end(signal.SIGKILL)
            time.sleep(0.3)
            daemon.start()
    door.close()
    counts = [event.get("count", 1) for event in daemon.events() if event["kind"] == "log.lost"]
    assert set(range(1, 3001)) <= set(counts)
    assert trouble == []
    daemon.end()
    report = verify(str(daemon.place / "log"))
    assert report.good, report.findings
    assert sum("killed" in note for note in report.notes) == 3


def test_a_stopped_keeper_is_noticed_in_time_and_its_return_too(start: Callable[..., Daemon]) -> None:
    """SIGSTOP: within the grace and one question the door says so; SIGCONT: all is well, nothing is lost."""
    daemon = start()
    said: list[tuple[float, str]] = []
    door = Door(
        lambda: SystemSink(daemon.socket, timeout_s=0.5), watching=lambda: True, grace_s=1.0,
        on_trouble=lambda why: said.append((time.monotonic(), why)),
    )  # fmt: skip
    door.put("lost", "broker", 1.0, 11, "before")
    time.sleep(0.5)
    daemon.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    while not said and time.monotonic() - stopped < 15:
        time.sleep(0.05)
    assert said
    assert said[0][1]
    assert said[0][0] - stopped < 4 + 1 + 2
    door.put("lost", "broker", 1.0, 12, "meanwhile")
    daemon.process.send_signal(signal.SIGCONT)
    while len(said) < 2 and time.monotonic() - stopped < 25:
        time.sleep(0.05)
    assert said[1][1] == ""
    door.close()
    assert {11, 12} <= {event.get("count") for event in daemon.events()}


def test_a_full_disk_confirms_nothing_and_loses_nothing(start: Callable[..., Daemon]) -> None:
    """What could not be written is not confirmed; with room again it is written once, the log says so and verifies."""
    daemon = start()
    sender = Sender(daemon.socket, timeout_s=1.0)
    sender.send([warned(1)])
    subprocess.run(["prlimit", f"--pid={daemon.process.pid}", "--fsize=2000:"], check=True)
    with pytest.raises(OSError, match=r"answer|timed"):
        sender.send([warned(number) for number in range(2, 30)])
    assert max(path.stat().st_size for path in (daemon.place / "log").glob("*.jsonl")) <= 2000
    late = Sender(daemon.socket, timeout_s=8.0)
    subprocess.run(["prlimit", f"--pid={daemon.process.pid}", "--fsize=unlimited:"], check=True)
    late.send([warned(30)])
    found = daemon.events()
    assert [event["message"] for event in found if event["kind"] == "run.warned"] == [str(n) for n in range(1, 31)]
    assert [event["kind"] for event in found].count("log.trouble") == 1
    daemon.end()
    assert verify(str(daemon.place / "log")).good


def test_a_signal_has_a_new_key_made(start: Callable[..., Daemon], tmp_path: Path) -> None:
    """SIGUSR1: heads are signed by another key from then on, which the first one vouches for."""
    daemon = start()
    first = tmp_path / "first.pem"
    first.write_bytes((tmp_path / "log/keys.pem").read_bytes())
    daemon.process.send_signal(signal.SIGUSR1)
    Sender(daemon.socket).send([warned(1)])
    until = time.monotonic() + 20
    while (tmp_path / "log/keys.pem").read_bytes() == first.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)
    daemon.end()
    report = verify(str(tmp_path / "log"), key=str(first))
    assert report.good, report.findings
    assert len(report.keys) == 2


def test_confirmations_count_frames(start: Callable[..., Daemon]) -> None:
    """The protocol as documented: u32 length, u8 type, payload; K carries how many E frames are in the log."""
    daemon = start()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(daemon.socket)
    for _ in range(2):
        sock.sendall(HEADER.pack(0, ord("E")))
    data = b""
    while not data.endswith(HEADER.pack(8, ord("K")) + COUNT.pack(2)):
        data += sock.recv(100)
    sock.close()


def test_what_is_sent_again_stands_once(start: Callable[..., Daemon]) -> None:
    """A repeated event is known by its id, also by the keeper after a killed one; another with that id is recorded."""
    daemon = start()
    first = [warned(number, id=f"door-{number}") for number in range(50)]
    Sender(daemon.socket).send(first)
    Sender(daemon.socket).send(first[25:])
    daemon.end(signal.SIGKILL)
    daemon.start()
    Sender(daemon.socket).send([*first, warned(50, id="door-7"), warned(51), warned(51)])
    found = [event for event in daemon.events() if event["kind"] == "run.warned"]
    assert [event["message"] for event in found] == [*(str(number) for number in range(51)), "51", "51"]
    assert found[50]["id"] == "door-7"
    daemon.end()
    assert verify(str(daemon.place / "log")).good


def test_a_door_numbers_what_it_tells(start: Callable[..., Daemon]) -> None:
    """Every event that comes through a door has an id, and no two have the same."""
    daemon = start()
    for _ in range(2):
        door = Door(lambda: SystemSink(daemon.socket))
        for number in range(20):
            door.put("lost", "broker", 1.0, number + 1, "test")
        door.close()
    ids = [event["id"] for event in daemon.events() if event["kind"] == "log.lost"]
    assert len(ids) == len(set(ids)) == 40
