"""The files of a log under everything that happens to them: kill -9, a full disk, rotation, steps of the clock.

After each, `verify` tells the truth: what was confirmed is there, nothing damaged is called whole or the reverse.
"""

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister.audit.chain import encode
from cloister.audit.event import Event
from cloister.audit.verify import Report
from cloister.errors import CloisterError
from cloister.host.audit_files import read_head, segments
from cloister.host.audit_log import Log
from cloister.runs.audit_keeper import Clock, Keeper, Rules
from cloister.runs.audit_verify import verify

pytestmark = pytest.mark.kernel
EVENT = encode(Event(time=1, kind="run.warned", run="0" * 12, message="x" * 100))


class Time:
    """Clocks that stand still until they are moved."""

    def __init__(self) -> None:
        """Begin today."""
        self.now, self.boot = time.time_ns(), 1_000_000_000

    def clock(self) -> Clock:
        """Return what a keeper reads."""
        return Clock(lambda: self.now, lambda: self.boot, "one-boot")

    def go(self, seconds: float, step: float = 0.0) -> None:
        """Let time pass; `step` sets the clock besides."""
        self.now += int((seconds + step) * 1e9)
        self.boot += int(seconds * 1e9)


def keeper(place: Path, rules: Rules | None = None, moves: Time | None = None) -> Keeper:
    """Return an open keeper that can sign."""
    one = Keeper(Log(str(place / "log")), str(place / "key"), rules or Rules(), clock=(moves or Time()).clock())
    one.open()
    try:
        one.wake()
    except BaseException:
        one.close()
        raise
    return one


def judged(place: Path) -> Report:
    """Verify the log."""
    return verify(str(place / "log"))


def kinds(place: Path) -> list[str]:
    """Return the kinds of all lines of segments that are not compressed."""
    paths = sorted((place / "log").glob("*.jsonl"))
    return [json.loads(line)["kind"] for path in paths for line in path.read_text().splitlines()]


def abandon(one: Keeper) -> None:
    """Leave the files as kill -9 does."""
    one._log.close()


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond a size (RLIMIT_FSIZE): writes are cut short, then refused, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_log_goes_on_over_keepers_and_keys_stay_private(tmp_path: Path) -> None:
    """Three keepers in turn write one chain with one key, which nobody else can read."""
    for _ in range(3):
        one = keeper(tmp_path)
        one.put([EVENT] * 5)
        one.close()
    report = judged(tmp_path)
    assert report.good, report.findings
    assert (report.segments, report.ending, len(report.keys)) == (1, "closed", 1)
    assert kinds(tmp_path).count("run.warned") == 15
    assert (tmp_path / "key/signing.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    head = read_head(str(tmp_path / "log"))
    assert head is not None
    assert f"{head.seq}:{head.hash}" == report.tip


@pytest.mark.parametrize("lost", range(1, 140, 7))
def test_a_write_cut_by_a_power_cut_is_told_and_kept_aside(tmp_path: Path, lost: int) -> None:
    """Whatever is missing of the last line: verify says torn, the next keeper keeps the half and goes on."""
    one = keeper(tmp_path)
    one.head("test")
    one.put([EVENT])
    abandon(one)
    (path,) = (tmp_path / "log").glob("*.jsonl")
    os.truncate(path, path.stat().st_size - lost)
    torn = judged(tmp_path)
    assert (torn.good, torn.ending) == (True, "torn")
    again = keeper(tmp_path)
    again.put([EVENT])
    again.close()
    report = judged(tmp_path)
    assert report.good, report.findings
    assert any("killed" in note for note in report.notes)
    (half,) = (tmp_path / "log").glob("torn-*")
    assert half.stat().st_size == torn.torn_bytes


def test_kill_nine_at_any_moment_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    """A keeper that rotates all the time is killed, over and over: every confirmed event is there, and all verifies."""
    confirmed = 0
    for turn in range(25):
        hear, say = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                one = keeper(tmp_path, Rules(rotate_bytes=4000, rotate_s=1e9))
                while True:
                    one.put([EVENT] * 3)
                    os.write(say, b"+")
                    one.tick()
            finally:
                os._exit(1)
        os.close(say)
        for _ in range(turn * 3 + 1):
            confirmed += 3 * len(os.read(hear, 1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(hear, 4096):
            confirmed += 3 * len(more)
        os.close(hear)
    one = keeper(tmp_path)
    one.close()
    report = judged(tmp_path)
    assert report.good, report.findings
    assert report.segments > 25
    own = report.heads + len(range(26)) + len(["log.closed"])
    assert report.last - own >= confirmed
    assert len([note for note in report.notes if "killed" in note]) == 25


def test_a_full_disk_writes_nothing_and_the_same_events_later(tmp_path: Path) -> None:
    """No half line stays, the chain does not move, and when there is room the log goes on without a gap."""
    one = keeper(tmp_path)
    one.put([EVENT])
    (path,) = (tmp_path / "log").glob("*.jsonl")
    size, seq = path.stat().st_size, one.seq
    with room(size + 150):
        for _ in range(3):
            with pytest.raises(OSError, match=r"large|space"):
                one.put([EVENT] * 4)
            assert (path.stat().st_size, one.seq) == (size, seq)
        with pytest.raises(OSError, match=r"large|space"):
            one.head("test")
    one.put([EVENT] * 4)
    one.close()
    assert judged(tmp_path).good
    assert kinds(tmp_path).count("run.warned") == 5


def test_a_disk_that_fills_up_in_a_rotation(tmp_path: Path) -> None:
    """At whichever byte the room ends, what follows once there is room again verifies."""
    for step, size in enumerate(range(600, 3400, 140)):
        place = tmp_path / str(step)
        place.mkdir()
        moves = Time()
        one = keeper(place, Rules(rotate_bytes=1500, rotate_s=1e9), moves)
        put = 0
        with room(size):
            for _ in range(20):
                moves.go(31)
                try:
                    one.put([EVENT])
                    put += 1
                    one.tick()
                except OSError:
                    continue
        for _ in range(5):
            moves.go(31)
            one.put([EVENT])
            one.tick()
        one.close()
        report = judged(place)
        assert report.good, (size, report.findings)
        for found in segments(str(place / "log")):
            assert found.first <= report.last


def test_rotation_by_size_and_by_time_compresses_what_is_closed(tmp_path: Path) -> None:
    """Segments end at the size or after the time; closed ones are compressed, and a copy verifies with a pinned key."""
    moves = Time()
    one = keeper(tmp_path, Rules(rotate_bytes=2000, rotate_s=3600), moves)
    for _ in range(10):
        one.put([EVENT] * 10)
        one.tick()
    by_size = judged(tmp_path).segments
    moves.go(3601)
    one.tick()
    assert (by_size, judged(tmp_path).segments) == (11, 12)
    wait(one)
    one.close()
    assert len(list((tmp_path / "log").glob("*.jsonl.gz"))) == 11
    os.rename(tmp_path / "log", tmp_path / "copy")
    report = verify(str(tmp_path / "copy"), key=str(tmp_path / "copy/keys.pem"))
    assert report.good, report.findings
    assert report.pinned
    assert report.ending == "closed"


def test_a_compressed_segment_that_was_touched_is_damage(tmp_path: Path) -> None:
    """One flipped bit, a cut end, an exchanged file: found as change, in that segment."""
    one = keeper(tmp_path, Rules(rotate_bytes=2000, rotate_s=3600))
    for _ in range(3):
        one.put([EVENT] * 10)
        one.tick()
    wait(one)
    one.close()
    packed = sorted((tmp_path / "log").glob("*.jsonl.gz"))[1]
    data = packed.read_bytes()
    for damaged in (data[:-9], data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]):
        packed.write_bytes(damaged)
        report = judged(tmp_path)
        assert not report.good
        assert report.findings[0].segment == packed.name
    packed.write_bytes(data)
    assert judged(tmp_path).good


def test_retention_removes_what_is_old_and_signs_that(tmp_path: Path) -> None:
    """Segments past their time go at a rotation; the log verifies from what is left, and says since where."""
    moves = Time()
    one = keeper(tmp_path, Rules(rotate_bytes=1 << 30, rotate_s=86400, retention_s=10 * 86400), moves)
    aged: set[str] = set()
    for _ in range(20):
        one.put([EVENT])
        moves.go(86401)
        one.tick()
        wait(one)
        for path in (tmp_path / "log").glob("0*"):  # the kernel's clock is not ours to move: files get the test's time
            if path.name not in aged:
                os.utime(path, (moves.now / 1e9, moves.now / 1e9))
                aged.add(path.name)
    one.close()
    report = judged(tmp_path)
    assert report.good, report.findings
    assert report.first > 1
    assert report.retired_to == report.first - 1
    assert 9 <= report.segments <= 13
    os.unlink(min((tmp_path / "log").glob("0*")))
    assert [finding.kind for finding in judged(tmp_path).findings] == ["removed"], "one more than was signed"


def test_a_clock_that_leaps_ahead_removes_nothing(tmp_path: Path) -> None:
    """A year ahead in a moment is not believed; verify tells of both steps, and calls neither damage."""
    moves = Time()
    one = keeper(tmp_path, Rules(rotate_bytes=2000, rotate_s=1e9, retention_s=10 * 86400), moves)
    for _ in range(3):
        one.put([EVENT] * 10)
        one.tick()
    moves.go(20, step=365 * 86400)
    one.put([EVENT] * 10)
    one.tick()
    moves.go(20, step=-366 * 86400)
    one.put([EVENT] * 10)
    one.tick()
    wait(one)
    one.close()
    report = judged(tmp_path)
    assert (report.good, report.first) == (True, 1), report.findings
    steps = [note for note in report.notes if "clock was set" in note]
    assert len(steps) == 2
    assert "+31536000.0 s" in steps[0]


def test_a_second_keeper_and_an_open_place_are_refused(tmp_path: Path) -> None:
    """One writer; no directory that others could change; no key that others could read."""
    one = keeper(tmp_path)
    with pytest.raises(CloisterError, match="another process") as twice:
        keeper(tmp_path)
    assert twice.value.reference == "audit-in-use"
    one.close()
    (tmp_path / "log").chmod(0o770)
    with pytest.raises(CloisterError) as loose:
        keeper(tmp_path)
    assert loose.value.reference == "audit-unsafe"
    (tmp_path / "log").chmod(0o700)
    (tmp_path / "key/signing.pem").chmod(0o644)
    with pytest.raises(CloisterError) as shown:
        keeper(tmp_path)
    assert shown.value.reference == "audit-key"
    (tmp_path / "key/signing.pem").chmod(0o600)
    keeper(tmp_path).close()


def test_a_new_key_is_vouched_for_by_the_old_one(tmp_path: Path) -> None:
    """After a change of keys the first public key is enough to verify everything."""
    one = keeper(tmp_path)
    one.head("test")
    first = (tmp_path / "log/keys.pem").read_text()
    one.new_key()
    one.put([EVENT])
    one.close()
    keeper(tmp_path).close()
    (tmp_path / "first.pem").write_text(first)
    report = verify(str(tmp_path / "log"), key=str(tmp_path / "first.pem"))
    assert report.good, report.findings
    assert len(report.keys) == 2


@pytest.mark.parametrize("damage", ["HEAD", "keys.pem", "segment"])
def test_files_that_are_gone_are_missed(tmp_path: Path, damage: str) -> None:
    """Without HEAD nobody knows where the log ended; without keys nothing is verified; an empty log is none."""
    one = keeper(tmp_path)
    one.close()
    target: dict[str, Callable[[], Path]] = {
        "HEAD": lambda: tmp_path / "log/HEAD",
        "keys.pem": lambda: tmp_path / "log/keys.pem",
        "segment": lambda: next((tmp_path / "log").glob("0*")),
    }
    assert judged(tmp_path).good
    target[damage]().unlink()
    if damage == "HEAD":
        assert [finding.kind for finding in judged(tmp_path).findings] == ["head-missing"]
    else:
        with pytest.raises(CloisterError):
            judged(tmp_path)


def wait(one: Keeper) -> None:
    """Wait until the thread that compresses is done."""
    if one._packing:
        one._packing.join(10)


@pytest.mark.parametrize("call", ["write", "fdatasync", "rename"])
def test_a_disk_with_errors_stops_the_log_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """EIO: a head that is not on the disk lets nothing follow it; when the disk answers again, all goes on and fits."""
    one = keeper(tmp_path)
    one.put([EVENT] * 2)
    one.head("test")
    before = read_head(str(tmp_path / "log"))

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(OSError, match="Input/output"):
            one.head("test")
        seq = one.seq
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                one.put([EVENT])
        assert one.seq == seq
        assert read_head(str(tmp_path / "log")) == before
    assert judged(tmp_path).good
    one.put([EVENT])
    assert call == "write" or read_head(str(tmp_path / "log")) != before
    one.close()
    assert judged(tmp_path).good
    assert kinds(tmp_path).count("run.warned") == 3
