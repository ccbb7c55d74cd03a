"""Frames of seccomp's user notification: hostile ones say nothing, and none of them costs more than it may."""

import hashlib
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.host.frames import encode_list
from cloister.policy.model import Audit
from cloister.runs import notices
from cloister.runs.notices import Notices, demand


def frame(call: int, *items: bytes, pid: int = 7, parent: int = 1) -> bytes:
    """Return the payload of a frame `N`."""
    return struct.pack("<IIB", pid, parent, call) + encode_list(list(items))


def heard(*payloads: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return what is told of some frames."""
    told: list[tuple[str, dict[str, Any]]] = []
    listener = Notices(lambda kind, fields: told.append((kind, fields)), clock=lambda: 0.0)
    for payload in payloads:
        listener.take(payload, ())
    return told


def test_programs_and_addresses_are_read() -> None:
    """Arguments that are no UTF-8 stand as escapes; each family has its own address; AF_UNSPEC leads nowhere."""
    inet = struct.pack("<H", socket.AF_INET) + struct.pack("!H4s", 443, bytes((192, 0, 2, 7))) + bytes(8)
    inet6 = struct.pack("<H", socket.AF_INET6) + struct.pack("!HI16s", 25, 0, socket.inet_pton(10, "2001:db8::7"))
    hidden = struct.pack("<H", socket.AF_UNIX) + b"\0hidden"
    told = heard(
        frame(1, b"sh", b"/bin/sh", b"/w", b"sh", b"\xff"),
        frame(3, b"curl", b"/usr/bin/curl", inet),
        frame(3, b"curl", b"", inet6 + bytes(4)),
        frame(3, b"x", b"", hidden),
        frame(3, b"x", b"", bytes(16)),
    )
    assert told[0][1]["words"] == ["sh", "\\xff"]
    assert (told[1][1]["ip"], told[1][1]["port"]) == ("192.0.2.7", 443)
    assert (told[2][1]["ip"], told[2][1]["port"]) == ("2001:db8::7", 25)
    assert told[3][1]["socket"] == "@hidden"
    assert len(told) == 4


@given(st.one_of(st.binary(max_size=300), st.lists(st.binary(max_size=40), max_size=6).map(lambda i: frame(3, *i))))
def test_no_frame_is_more_than_ignored(payload: bytes) -> None:
    """Whatever comes is told or not; nothing is raised, and nothing beyond our own words gets out."""
    for kind, fields in heard(payload):
        assert kind in {"executed", "connected"}
        assert {"pid", "parent", "name", "path", "time"} <= set(fields)


def test_what_comes_too_fast_is_counted() -> None:
    """Beyond the rate nothing is told but the number of what was left out; later there is room again."""
    told: list[tuple[str, dict[str, Any]]] = []
    now = [0.0]
    listener = Notices(lambda kind, fields: told.append((kind, fields)), clock=lambda: now[0])
    for _ in range(notices.BURST + 40):
        listener.take(frame(1, b"a", b"/a", b"/"), ())
    assert len(told) == notices.BURST
    now[0] = 2.0
    listener.take(frame(1, b"a", b"/a", b"/"), ())
    listener.flush()
    assert [fields["count"] for kind, fields in told if kind == "notices-lost"] == [40]
    assert len(told) == notices.BURST + 2


@pytest.mark.parametrize(
    ("settings", "there", "guest", "wanted"),
    [
        (Audit(), False, False, ""),
        (Audit(fallback="seccomp"), False, False, "calls"),
        (Audit(fallback="seccomp"), True, False, ""),
        (Audit(fallback="seccomp"), True, True, "calls"),
        (Audit(hashes=True), True, False, "files"),
    ],
)
def test_the_fallback_is_for_hosts_without_a_sensor(
    tmp_path: Path, settings: Audit, there: bool, guest: bool, wanted: str
) -> None:
    """A sensor makes it needless, but not for a guest's own kernel, and not for digests."""
    sensor = tmp_path / "sensor.sock"
    if there:
        sensor.touch()
    assert demand(settings, sensor=str(sensor), guest=guest) == wanted


def test_no_digest_of_what_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes while it is read has no digest, nor has a directory or a huge file; one at rest has."""
    program = tmp_path / "program"
    program.write_bytes(b"one")
    assert notices.digest(os.open(program, os.O_RDONLY)).startswith("7692c3ad")
    real = hashlib.file_digest

    def slowly(*words: Any) -> Any:
        found = real(*words)
        program.write_bytes(b"other")
        return found

    program.write_bytes(b"more")
    monkeypatch.setattr(hashlib, "file_digest", slowly)
    assert notices.digest(os.open(program, os.O_RDONLY)) == ""
    assert notices.digest(os.open(tmp_path, os.O_RDONLY)) == ""
    monkeypatch.setattr(notices, "HASH_BYTES", 1)
    assert notices.digest(os.open(program, os.O_RDONLY)) == ""
