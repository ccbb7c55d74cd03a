"""Asking the system's manager about units: what is understood of its answers, and what is waited for."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_systemd_manager import JOB, NOISE, OK, Fake, message, pad, text

from cloister.host import unit_start
from cloister.host.systemd_manager import ManagerError
from cloister.host.systemd_units import UnitManager
from cloister.host.unit_dbus import start_call

pytestmark = pytest.mark.kernel

UNIT = "cloister-run-1a.service"
GREETING = OK + b"AGREE_UNIX_FD\r\n"
UNKNOWN = "org.freedesktop.DBus.Error.UnknownProperty"


def value(serial: int, kind: str, data: bytes) -> bytes:
    """Return the answer to a Get: a variant, its value aligned to 8 at most."""
    head = bytes([len(kind)]) + kind.encode() + b"\0"
    size = {"b": 4, "s": 4, "o": 4, "i": 4, "u": 4, "ay": 4, "as": 4}.get(kind, 8)
    return message(2, {5: ("u", serial), 8: ("g", "v")}, head + bytes(-len(head) % size) + data)


def error(serial: int, name: str) -> bytes:
    """Return an error as an answer."""
    return message(3, {4: ("s", name), 5: ("u", serial), 8: ("g", "s")}, text("no"))


def removed(job: str, unit: str, result: str) -> bytes:
    """Return the signal that tells how a job ended."""
    body = pad(pad(struct.pack("<I", 7) + text(job), text(unit)), text(result))
    return message(4, {3: ("s", "JobRemoved"), 8: ("g", "uoss")}, body)


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[list[Fake]]:
    """Fakes that are closed afterwards."""
    made: list[Fake] = []
    yield made
    for fake in made:
        fake.close()


def connect(fakes: list[Fake], folder: Path, answers: bytes) -> UnitManager:
    """Return a connection to a manager that says so."""
    place = folder / str(len(fakes))
    place.mkdir()
    fakes.append(Fake(place, answers, GREETING))
    return UnitManager(fakes[-1].path, timeout_s=1)


def test_properties_in_the_words_of_systemctl(fakes: list[Fake], tmp_path: Path) -> None:
    """Texts, yes and no, numbers, lists and ids are told as `systemctl show` does; what is unknown is left out."""
    answers = (
        value(1, "s", text("cl-a-b")) + NOISE + value(2, "b", struct.pack("<I", 1)) + value(3, "t", b"\xff" * 8)
        + value(4, "ay", struct.pack("<I", 2) + b"\xab\xcd") + error(5, UNKNOWN) + value(6, "i", struct.pack("<i", -2))
        + value(7, "as", struct.pack("<I", 11) + text("native"))
    )  # fmt: skip
    names = ("User", "NoNewPrivileges", "MemoryMax", "InvocationID", "PrivatePIDs", "OOMScoreAdjust", "Archs")
    with connect(fakes, tmp_path, answers) as manager:
        assert manager.show(UNIT, names) == {
            "User": "cl-a-b", "NoNewPrivileges": "yes", "MemoryMax": "infinity", "InvocationID": "abcd",
            "OOMScoreAdjust": "-2", "Archs": "native",
        }  # fmt: skip
    fakes[0].close()
    assert b"/org/freedesktop/systemd1/unit/cloister_2drun_2d1a_2eservice\0" in fakes[0].heard


@pytest.mark.parametrize(
    ("name", "number", "shown"),
    [
        ("CapabilityBoundingSet", 0, ""),
        ("CapabilityBoundingSet", 1 << 21, "0x200000"),
        ("RestrictNamespaces", 0, "yes"),
        ("RestrictNamespaces", 0x7E020080, "no"),
        ("RestrictNamespaces", 0x10000000, "0x10000000"),
    ],
)
def test_sets_that_stand_for_words(fakes: list[Fake], tmp_path: Path, name: str, number: int, shown: str) -> None:
    """A set of capabilities or namespaces equals what was asked for only where it is really that: empty, or all."""
    with connect(fakes, tmp_path, value(1, "t", struct.pack("<Q", number))) as manager:
        assert manager.show(UNIT, (name,)) == {name: shown}


def test_other_errors_are_no_missing_properties(fakes: list[Fake], tmp_path: Path) -> None:
    """A manager that refuses to answer is not taken for one that does not know the property."""
    with connect(fakes, tmp_path, error(1, "org.x.AccessDenied")) as manager, pytest.raises(ManagerError):
        manager.show(UNIT, ("User",))


def test_a_type_nobody_expects_is_an_error(fakes: list[Fake], tmp_path: Path) -> None:
    """What is not understood never counts as verified."""
    with connect(fakes, tmp_path, value(1, "d", bytes(8))) as manager, pytest.raises(ManagerError):
        manager.show(UNIT, ("User",))


def test_the_end_of_a_job_is_heard_even_before_it_is_asked_for(fakes: list[Fake], tmp_path: Path) -> None:
    """A unit's job that ended while a property was asked for is not waited for; those of others do not count."""
    answers = removed("/9", "b.service", "done") + removed(JOB, UNIT, "failed") + value(1, "s", text("x"))
    with connect(fakes, tmp_path, answers) as manager:
        manager.show(UNIT, ("User",))
        assert manager.await_end(JOB) == "failed"
    with connect(fakes, tmp_path, removed("/9", UNIT, "done")) as manager, pytest.raises(ManagerError):
        manager.await_end(JOB)


def test_a_start_is_asked_for_with_its_streams(fakes: list[Fake], tmp_path: Path) -> None:
    """The job of the answer to it counts; a refusal has a name, and a manager that takes no descriptors is left."""
    call = start_call(UNIT, (("User", "a"),), ("/shim", "x"))
    answer = message(2, {5: ("u", 1), 8: ("g", "o")}, text(JOB))
    hear, say = os.pipe()
    with connect(fakes, tmp_path, NOISE + answer) as manager:
        manager.ask_start(call, (hear, say, say))
        assert manager.await_answer() == JOB
    fakes[0].close()
    assert b"NEGOTIATE_UNIX_FD\r\n" in fakes[0].heard
    assert fakes[0].heard.endswith(call)
    assert fakes[0].got == [os.fstat(hear).st_ino] * 3  # both ends of a pipe are one
    with connect(fakes, tmp_path, error(1, "org.x.Denied")) as manager:
        manager.ask_start(call, (hear, say, say))
        with pytest.raises(ManagerError) as refused:
            manager.await_answer()
    assert refused.value.name == "org.x.Denied"
    for one in (hear, say):
        os.close(one)
    fakes.append(Fake(tmp_path, b"", OK + b"ERROR\r\n"))
    with UnitManager(fakes[-1].path, timeout_s=1) as manager, pytest.raises(ManagerError):
        manager.show(UNIT, ("User",))


@pytest.mark.parametrize(("job", "stopped"), [(17, True), (0, False)])
def test_a_start_that_is_only_in_line_is_taken_out_of_it(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: int, stopped: bool
) -> None:
    """A unit that is inactive but has a job would start later: it is not over, and is stopped; without one it is."""

    def state(job: int) -> bytes:
        names = {"LoadState": "loaded", "ActiveState": "inactive"}
        told = [value(at, "s", text(names[name])) for at, name in enumerate(unit_start._ENDED, 1) if name in names]
        jobs = [value(at, "(uo)", struct.pack("<I", job) + text("/"))
                for at, name in enumerate(unit_start._ENDED, 1) if name == "Job"]  # fmt: skip
        rest = [error(at, UNKNOWN) for at, name in enumerate(unit_start._ENDED, 1) if name not in {*names, "Job"}]
        return b"".join((*told, *jobs, *rest))

    number = len(unit_start._ENDED) + 1
    end = message(2, {5: ("u", number), 8: ("g", "o")}, text(JOB)) + removed(JOB, UNIT, "done")
    said = iter([state(job) + end, state(0)])

    def manager(timeout_s: float) -> UnitManager:
        del timeout_s
        return connect(fakes, tmp_path, next(said))

    monkeypatch.setattr(unit_start, "UnitManager", manager)
    assert unit_start.stop(UNIT)["ActiveState"] == "inactive"
    for fake in fakes:
        fake.close()
    assert (b"StopUnit" in fakes[0].heard) == stopped
    assert len(fakes) == 1 + stopped


def test_stopping_waits_for_its_own_job(fakes: list[Fake], tmp_path: Path) -> None:
    """A start that a stop cancels ends first, and is not taken for the end of the unit."""
    answer = message(2, {5: ("u", 1), 8: ("g", "o")}, text(JOB))
    with connect(fakes, tmp_path, removed("/8", UNIT, "canceled") + answer) as manager, pytest.raises(ManagerError):
        manager.end(UNIT, kill=False)
    with connect(fakes, tmp_path, removed("/8", UNIT, "canceled") + answer + removed(JOB, UNIT, "done")) as manager:
        manager.end(UNIT, kill=False)


def test_a_unit_that_is_gone_is_stopped(fakes: list[Fake], tmp_path: Path) -> None:
    """Stopping and forgetting what is not there is fine; another refusal is not."""
    gone = "org.freedesktop.systemd1.NoSuchUnit"
    with connect(fakes, tmp_path, error(1, gone)) as manager:
        manager.end(UNIT, kill=True)
    with connect(fakes, tmp_path, error(1, gone)) as manager:
        manager.forget(UNIT)
    with connect(fakes, tmp_path, error(1, "org.x.Denied")) as manager, pytest.raises(ManagerError):
        manager.end(UNIT, kill=False)
