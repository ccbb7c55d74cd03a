"""The system's keeper on a file system of its own that really fills up, or becomes read-only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.audit.chain import encode
from cloister.audit.event import Event
from cloister.host.audit_send import Sender
from cloister.runs.audit_verify import verify

pytestmark = pytest.mark.kernel
ROOT = os.getuid() == 0


class Disk:
    """A keeper in a mount namespace whose log is on a small tmpfs."""

    def __init__(self, place: Path, size: str) -> None:
        """Mount it and start the keeper."""
        self.place, self.socket, self.log = place, str(place / "audit.sock"), place / "log"
        self.log.mkdir()
        mount = f'mount -t tmpfs -o size={size},mode=0700 none "$0" && echo && exec sleep 300'
        self.holder = subprocess.Popen(
            ["unshare", "-m" if ROOT else "-rm", "sh", "-c", mount, str(self.log)], stdout=subprocess.PIPE
        )
        assert self.holder.stdout
        assert self.holder.stdout.readline() == b"\n"
        flags = ["-m"] if ROOT else ["-U", "-m", "--preserve-credentials"]
        self.enter = ["nsenter", "-t", str(self.holder.pid), *flags]
        self.keeper: subprocess.Popen[bytes] | None = None
        assert self.start()

    def start(self) -> bool:
        """Start a keeper; return whether it says that it is ready."""
        name = f"cl-full-{os.getpid()}-{time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(f"\0{name}")
            notify.settimeout(0.2)
            command = [*self.enter, sys.executable, "-m", "cloister.services.auditd", "--socket", self.socket, "--log",
                       str(self.log), "--keys", str(self.place / "key")]  # fmt: skip
            path = os.pathsep.join(sys.path)
            self.keeper = subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": path, "NOTIFY_SOCKET": f"@{name}"}, stderr=subprocess.DEVNULL
            )
            until = time.monotonic() + 20
            while self.keeper.poll() is None and time.monotonic() < until:
                with contextlib.suppress(TimeoutError):
                    return notify.recv(100) == b"READY=1"
        return False

    def kill(self) -> None:
        """Kill the keeper."""
        if self.keeper and self.keeper.poll() is None:
            self.keeper.send_signal(signal.SIGKILL)
        if self.keeper:
            self.keeper.wait(10)

    def remount(self, options: str) -> None:
        """Change the file system."""
        words = [
            "mount",
            "--options-source",
            "disable",
            "-t",
            "tmpfs",
            "-o",
            f"remount,{options}",
            "none",
            str(self.log),
        ]
        subprocess.run([*self.enter, *words], check=True)  # else mount(8) gives an owner that this namespace has not

    def events(self) -> list[dict[str, Any]]:
        """Return what is in the log; half a line would not be read."""
        paths = sorted(Path(f"/proc/{self.holder.pid}/root{self.log}").glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]

    def told(self) -> list[str]:
        """Return the messages of what was reported."""
        return [event["message"] for event in self.events() if event["kind"] == "run.warned"]

    def good(self) -> bool:
        """Say whether the log verifies."""
        return verify(f"/proc/{self.holder.pid}/root{self.log}").good

    def fill(self, size: int, each: int) -> tuple[list[bytes], int]:
        """Report until nothing is confirmed any more; return all that was sent, and how much was confirmed."""
        sent: list[bytes] = []
        confirmed = 0
        sender = Sender(self.socket, timeout_s=1.5)
        with contextlib.suppress(OSError):
            while True:
                batch = [warned(len(sent) + number, size) for number in range(each)]
                sent += batch
                sender.send(batch)
                confirmed += each
        return sent, confirmed


def warned(number: int, size: int) -> bytes:
    """Return an event as a door tells it."""
    more = {"fill": "x" * size}
    event = Event(time=time.time_ns(), kind="run.warned", message=str(number), id=f"door-{number}", details=more)
    return encode(event)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Half a mebibyte."""
    made = Disk(tmp_path, "512k")
    yield made
    made.kill()
    made.holder.kill()
    made.holder.wait()


def test_a_disk_that_is_really_full(disk: Disk) -> None:
    """What was confirmed is there, nothing more is confirmed, verify says good; with room all goes on, each once."""
    sent, confirmed = disk.fill(1000, 20)
    numbers = [str(number) for number in range(len(sent))]
    assert 200 < confirmed < len(sent)
    assert disk.told()[:confirmed] == numbers[:confirmed]
    assert disk.good()

    disk.remount("size=2m")
    Sender(disk.socket, timeout_s=10).send(sent[confirmed:])  # a door sends again what was not confirmed
    assert disk.told() == numbers
    assert [event["kind"] for event in disk.events()].count("log.trouble") == 1
    assert disk.good()


def test_a_keeper_that_is_killed_on_a_full_disk(disk: Disk) -> None:
    """The next one does not start before there is room, and then has everything that was confirmed."""
    sent, confirmed = disk.fill(1000, 20)
    disk.kill()
    filler = Path(f"/proc/{disk.holder.pid}/root{disk.log}/filler")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    assert disk.good()
    full = disk.start()
    if full:  # what was left of the last page was enough to say that it opened: nothing more is confirmed
        with pytest.raises(OSError, match=r"answer|timed|closed|reset"):
            Sender(disk.socket, timeout_s=1.5).send(sent[confirmed:])
    disk.kill()
    disk.remount("size=2m")
    assert disk.start()
    Sender(disk.socket, timeout_s=10).send(sent[confirmed:])
    assert disk.told() == [str(number) for number in range(len(sent))]
    assert disk.good()


def test_a_place_without_room_for_another_file(disk: Disk) -> None:
    """With the head that cannot be noted nothing is confirmed any more; with room again all goes on, each once."""
    disk.remount("size=64m")
    place = os.statvfs(f"/proc/{disk.holder.pid}/root{disk.log}")
    disk.remount(f"nr_inodes={place.f_files - place.f_ffree}")
    sent, confirmed = disk.fill(10, 500)
    assert 0 < confirmed < 10_500
    assert len(disk.told()) >= confirmed
    assert disk.good()

    disk.remount("nr_inodes=100")
    Sender(disk.socket, timeout_s=10).send(sent[confirmed:])
    assert disk.told() == [str(number) for number in range(len(sent))]
    assert disk.good()


def test_a_read_only_place(disk: Disk) -> None:
    """No keeper starts there, and the log verifies as it is; writable again, the next goes on."""
    Sender(disk.socket).send([warned(0, 10)])
    disk.kill()
    disk.remount("ro")
    assert not disk.start()
    assert (disk.told(), disk.good()) == (["0"], True)
    disk.remount("rw")
    assert disk.start()
    Sender(disk.socket).send([warned(1, 10)])
    assert (disk.told(), disk.good()) == (["0", "1"], True)
