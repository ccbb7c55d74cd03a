"""Talking to a systemd manager: what is sent, and what strange answers come to. The manager is made up."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from cloister.errors import StepError
from cloister.host import limits
from cloister.host.systemd_manager import Manager, ManagerError
from cloister.plan.steps import LimitCgroup, LimitScope

pytestmark = pytest.mark.kernel

OK = b"OK 0123456789abcdef0123456789abcdef\r\n"
JOB = "/org/freedesktop/systemd1/job/7"


def message(kind: int, fields: dict[int, tuple[str, str | int]], body: bytes = b"") -> bytes:
    """Marshal a message as a manager would."""
    header = b""
    for code, (letter, value) in fields.items():
        header += bytes(-len(header) % 8) + bytes([code, 1]) + letter.encode() + b"\0"
        header += struct.pack("<I", value) if isinstance(value, int) else text(value, signature=letter == "g")
    head = struct.pack("<cBBBIII", b"l", kind, 1, 1, len(body), 99, len(header)) + header
    return head + bytes(-len(head) % 8) + body


def text(value: str, *, signature: bool = False) -> bytes:
    """Marshal a string."""
    length = bytes([len(value)]) if signature else struct.pack("<I", len(value))
    return length + value.encode() + b"\0"


def pad(data: bytes, more: bytes) -> bytes:
    """Put `more` behind `data`, aligned to 4."""
    return data + bytes(-len(data) % 4) + more


def removed(job: str, result: str) -> bytes:
    """Return the signal that tells how a job ended."""
    body = pad(pad(struct.pack("<I", 7) + text(job), text("cloister-x.scope")), text(result))
    return message(4, {3: ("s", "JobRemoved"), 8: ("g", "uoss")}, body)


ANSWER = message(2, {5: ("u", 1), 8: ("g", "o")}, text(JOB))
NOISE = message(4, {3: ("s", "UnitNew"), 8: ("g", "so")}, pad(text("a.scope"), text("/x")))


class Fake:
    """A manager that says what it was told to say, and keeps what it hears."""

    def __init__(self, folder: Path, answers: bytes, greeting: bytes = OK) -> None:
        """Listen."""
        self.path = str(folder / "private")
        self.heard = b""
        self.got: list[int] = []
        """The inodes of descriptors that came."""
        self._words = greeting + answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer, contextlib.suppress(ConnectionError):  # a client that has heard enough resets
            peer.sendall(self._words)
            while True:
                part, descriptors, _, _ = socket.recv_fds(peer, 4096, 8)
                for descriptor in descriptors:
                    self.got.append(os.fstat(descriptor).st_ino)
                    os.close(descriptor)
                if not part:
                    break
                self.heard += part

    def close(self) -> None:
        """End when the other side has."""
        self._thread.join(5)
        self._listener.close()


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[list[Fake]]:
    """Fakes that are closed afterwards."""
    made: list[Fake] = []
    yield made
    for fake in made:
        fake.close()


def start(fakes: list[Fake], folder: Path, answers: bytes, greeting: bytes = OK, timeout_s: float = 2) -> None:
    """Ask a fake that answers so for a scope."""
    fakes.append(Fake(folder, answers, greeting))
    with Manager(fakes[-1].path, timeout_s=timeout_s) as manager:
        manager.start_scope("cloister-x.scope", 4321, {"MemoryMax": ("t", 1 << 30)})


def test_a_scope_is_there_when_its_job_is_done(fakes: list[Fake], tmp_path: Path) -> None:
    """The call names unit, process and limit; signals of others do not confuse it."""
    start(fakes, tmp_path, NOISE + ANSWER + NOISE + removed("/other", "failed") + removed(JOB, "done"))
    fakes[0].close()

    assert fakes[0].heard.startswith(b"\0AUTH EXTERNAL ")
    for part in (b"StartTransientUnit", b"cloister-x.scope\0", b"fail\0", b"MemoryMax", struct.pack("<Q", 1 << 30),
                 b"PIDs\0\x02au\0", struct.pack("<II", 4, 4321)):  # fmt: skip
        assert part in fakes[0].heard


REFUSALS = {
    "not wanted": (b"", b"REJECTED EXTERNAL\r\n"),
    "an endless greeting": (b"", b"x" * 5000),
    "an error": (message(3, {4: ("s", "org.x.Error"), 5: ("u", 1), 8: ("g", "s")}, text("no")), OK),
    "a failed job": (ANSWER + removed(JOB, "failed"), OK),
    "silence": (b"", OK),
    "talk without end": (NOISE * 200_000, OK),
    "half a message": (ANSWER[:20], OK),
    "a huge message": (struct.pack("<cBBBIII", b"l", 2, 0, 1, 1 << 30, 1, 8), OK),
    "another byte order": (b"B" + ANSWER[1:], OK),
    "a string beyond the end": (message(2, {5: ("u", 1), 8: ("g", "o")}, struct.pack("<I", 999) + b"x\0"), OK),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_clear_yes_is_a_no(fakes: list[Fake], tmp_path: Path, case: str) -> None:
    """A refusal, a failed job, silence and nonsense all raise, in time."""
    answers, greeting = REFUSALS[case]
    with pytest.raises(ManagerError) as caught:
        start(fakes, tmp_path, answers, greeting, timeout_s=0.2)
    assert caught.value.name == ("org.x.Error" if case == "an error" else "")


def test_no_manager_is_an_error_of_ours(tmp_path: Path) -> None:
    """Nobody listens: no traceback."""
    with pytest.raises(ManagerError):
        Manager(str(tmp_path / "absent"))


def test_stopping_what_is_not_there_is_fine(fakes: list[Fake], tmp_path: Path) -> None:
    """An unknown unit is no error; another refusal is."""
    for name, fine in (("org.freedesktop.systemd1.NoSuchUnit", True), ("org.freedesktop.DBus.Error.Failed", False)):
        folder = tmp_path / name
        folder.mkdir()
        fakes.append(Fake(folder, message(3, {4: ("s", name), 5: ("u", 1), 8: ("g", "s")}, text("no"))))
        with Manager(fakes[-1].path) as manager:
            if fine:
                manager.stop("cloister-x.scope")
            else:
                with pytest.raises(ManagerError):
                    manager.stop("cloister-x.scope")


@hypothesis.given(junk=st.binary(max_size=200), keep=st.integers(0, 80))
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_no_answer_crashes_the_reader(junk: bytes, keep: int) -> None:
    """Bytes of any kind behind a good beginning end in a result or in our own error."""
    ours, theirs = socket.socketpair()
    theirs.sendall(ANSWER[:keep] + junk)
    theirs.shutdown(socket.SHUT_WR)
    manager = Manager.__new__(Manager)
    manager._socket, manager.serial, manager._until = ours, 0, time.monotonic() + 5
    manager._arrived, manager._awaited = bytearray(), ()
    try:
        manager.start_scope("cloister-x.scope", 1, {})
    except ManagerError:
        pass
    else:
        pytest.fail("junk was taken for a scope that is there")
    finally:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("step", [LimitCgroup(path="/sys/fs/cgroup/x"), LimitScope(unit="x.scope")])
def test_without_a_sandbox_nothing_is_entered(step: LimitCgroup | LimitScope) -> None:
    """No first process below the client: refused, never waved through."""
    with pytest.raises(StepError) as caught:
        limits.enter(step, 2**22 + 1)
    assert caught.value.reference == "limits-failed"


def test_a_limit_that_is_not_in_force_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the kernel's files say counts: silently dropped limits and the wrong cgroup are refused, pages rounded."""
    cgroup = tmp_path / "cloister-r.scope"
    cgroup.mkdir()
    mountinfo = f"30 24 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    texts = {"/proc/self/mountinfo": mountinfo, "/proc/7/cgroup": "0::/cloister-r.scope\n"}
    read = limits._read
    monkeypatch.setattr(limits, "_read", lambda path: texts.get(path) or read(path))
    step = LimitScope(unit="cloister-r.scope", memory_bytes=(1 << 20) + 5, tasks=9)
    (cgroup / "memory.max").write_text(f"{1 << 20}\n")
    (cgroup / "pids.max").write_text("9\n")

    assert limits._verified(step, 7, "cloister-r.scope") == str(cgroup)
    for name, value in (
        ("pids.max", "max\n"),
        ("pids.max", "10\n"),
        ("memory.max", "max\n"),
        ("memory.max", "2097152\n"),
    ):
        before = (cgroup / name).read_text()
        (cgroup / name).write_text(value)
        with pytest.raises(StepError):
            limits._verified(step, 7, "cloister-r.scope")
        (cgroup / name).write_text(before)
    (cgroup / "memory.swap.max").write_text("max\n")
    with pytest.raises(StepError):
        limits._verified(step, 7, "cloister-r.scope")
    (cgroup / "memory.swap.max").write_text("0\n")
    assert limits._verified(step, 7, "cloister-r.scope") == str(cgroup)
    with pytest.raises(StepError):
        limits._verified(step, 7, "cloister-other.scope")
