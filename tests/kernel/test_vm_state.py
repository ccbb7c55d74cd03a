"""A machine's state out of a monitor that may be its guest's: it gets a pipe, a bound and a time, never the file."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import StepError
from cloister.host import qmp, vm_state

pytestmark = pytest.mark.kernel
MIB = 1 << 20


class Monitor:
    """One that says what QEMU says, and writes what it is told to."""

    def __init__(
        self, *, state: bytes = b"state" * 1000, pieces: int = 1, status: str = "completed", lets_go: bool = True
    ):
        self.ours, self._theirs = socket.socketpair()
        self._state, self._pieces, self._status, self._lets_go = state, pieces, status, lets_go
        self.heard: list[dict[str, object]] = []
        self.written = threading.Event()
        threading.Thread(target=self._play, daemon=True).start()

    def _play(self) -> None:
        self._theirs.sendall(b'{"QMP": {}}\n')
        sink, rest = -1, b""
        while True:
            try:
                data, passed, _, _ = socket.recv_fds(self._theirs, 65536, 4)
            except OSError:
                return
            if not data:
                return
            sink = passed[0] if passed else sink
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                self.heard.append(asked)
                if asked["execute"] == "migrate":
                    threading.Thread(target=self._write, args=(sink,), daemon=True).start()
                if asked["execute"] == "query-migrate":
                    self.written.wait(20)
                answer = {"status": self._status} if asked["execute"] == "query-migrate" else {}
                self._theirs.sendall(json.dumps({"return": answer}).encode() + b"\n")

    def _write(self, sink: int) -> None:
        try:
            for _ in range(self._pieces):
                view = memoryview(self._state)
                while view:
                    view = view[os.write(sink, view) :]
        except OSError:
            pass
        if self._lets_go:
            os.close(sink)
        self.written.set()

    def close(self) -> None:
        """Leave."""
        self.ours.close()
        self._theirs.close()


@pytest.fixture
def closing() -> Iterator[list[Monitor]]:
    """Monitors to close at the end."""
    made: list[Monitor] = []
    yield made
    for one in made:
        one.close()


def test_what_it_writes_is_kept(tmp_path: Path, closing: list[Monitor]) -> None:
    """All of it, in a new file of ours, written as fast as it can be, and memory included."""
    monitor = Monitor(state=os.urandom(3 * MIB))
    closing.append(monitor)
    path = tmp_path / "memory"
    vm_state.keep(qmp.Qmp(monitor.ours), str(path), memory_mib=64)
    assert path.read_bytes() == monitor._state
    assert path.stat().st_mode & 0o777 == 0o600
    told = {str(one["execute"]): one["arguments"] for one in monitor.heard}
    assert told["migrate"] == {"uri": "fd:state"}
    assert told["migrate-set-capabilities"] == {"capabilities": [{"capability": "x-ignore-shared", "state": False}]}
    assert told["migrate-set-parameters"]["downtime-limit"] == 2_000_000  # type: ignore[index]
    assert "stop" not in told


def test_more_than_a_machine_can_hold_is_refused(tmp_path: Path, closing: list[Monitor]) -> None:
    """A monitor without end fills no disk: it is cut off at the size of its memory and its devices."""
    monitor = Monitor(state=bytes(MIB), pieces=200)
    closing.append(monitor)
    path = tmp_path / "memory"
    with pytest.raises(OSError, match="more than its machine") as caught:
        vm_state.keep(qmp.Qmp(monitor.ours), str(path), memory_mib=64)
    assert caught.value.errno == errno.EFBIG
    assert path.stat().st_size <= vm_state.most(64) < 130 * MIB


def test_a_monitor_that_does_not_let_go_has_its_time(tmp_path: Path, closing: list[Monitor]) -> None:
    """It says that it is done and keeps its end: the guest does not stand still for ever."""
    monitor = Monitor(lets_go=False)
    closing.append(monitor)
    began = time.monotonic()
    with pytest.raises(OSError, match="in time"):
        vm_state.keep(qmp.Qmp(monitor.ours), str(tmp_path / "memory"), memory_mib=64, timeout_s=0.5)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("status", ["failed", "cancelled", "made-up"])
def test_a_monitor_that_fails_says_so(tmp_path: Path, closing: list[Monitor], status: str) -> None:
    """Whatever was written by then counts for nothing."""
    monitor = Monitor(status=status)
    closing.append(monitor)
    with pytest.raises(StepError, match="was not written"):
        vm_state.keep(qmp.Qmp(monitor.ours), str(tmp_path / "memory"), memory_mib=64)


def test_a_monitor_that_writes_nothing_has_kept_nothing(tmp_path: Path, closing: list[Monitor]) -> None:
    """An empty state is none."""
    monitor = Monitor(state=b"")
    closing.append(monitor)
    with pytest.raises(StepError, match="no state"):
        vm_state.keep(qmp.Qmp(monitor.ours), str(tmp_path / "memory"), memory_mib=64)


def test_a_full_disk_is_said(tmp_path: Path, closing: list[Monitor]) -> None:
    """The file cannot grow: the error is that, and the monitor is let go."""
    monitor = Monitor(state=bytes(MIB), pieces=8)
    closing.append(monitor)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            vm_state.keep(qmp.Qmp(monitor.ours), str(tmp_path / "memory"), memory_mib=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert monitor.written.wait(10)


def test_no_file_is_written_over(tmp_path: Path, closing: list[Monitor]) -> None:
    """What has the name already stays, link or file."""
    (tmp_path / "memory").symlink_to(tmp_path / "elsewhere")
    monitor = Monitor()
    closing.append(monitor)
    with pytest.raises(FileExistsError):
        vm_state.keep(qmp.Qmp(monitor.ours), str(tmp_path / "memory"), memory_mib=64)
    assert not (tmp_path / "elsewhere").exists()
