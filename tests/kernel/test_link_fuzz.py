"""Random and half-right frames into both ends of the link, built with sanitizers: no crash, no memory error."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_guest import DATA_MAX, WINDOW, Fake, stream_of, u32
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from keeper_rig import PLACE, WALLS, Place
from shim_rig import ENVIRONMENT, as_user, order

import shim_build
from cloister.host import frames
from cloister.host.vm_link import PROTOCOL

pytestmark = pytest.mark.kernel
SANITIZER_EXIT = 99
OPTIONS = {
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={SANITIZER_EXIT}",
    "UBSAN_OPTIONS": f"exitcode={SANITIZER_EXIT}:halt_on_error=1",
}
OURS = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

numbers = st.sampled_from([
    0, 1, 2, 3, 5, 16, 18, 255, WINDOW - 1, WINDOW, WINDOW + 1, 0x7FFF_FFFF, 0xFFFF_FFFF,
    *(stream_of(command, k) for command in (0, 1, 7) for k in range(4)),
])  # fmt: skip
parts = st.one_of(
    numbers.map(u32),
    st.binary(max_size=12),
    st.sampled_from([b"\1egress.sock", b"\1", b"\0", b"exec", bytes(DATA_MAX), bytes(300)]),
    st.lists(st.binary(max_size=9), max_size=4).map(frames.encode_list),
)
payloads = st.lists(parts, max_size=4).map(b"".join)


def framed(kind: str, payload: bytes) -> bytes:
    """Return one frame's bytes."""
    return struct.pack("<IB", len(payload), ord(kind)) + payload


def streams(kinds: str) -> st.SearchStrategy[bytes]:
    """Return frames of these types, sometimes damaged."""
    whole = st.lists(st.builds(framed, st.sampled_from(kinds), payloads), min_size=1, max_size=12).map(b"".join)
    damaged = st.builds(
        lambda data, at, cut, put: data[: at % len(data)] + put + data[at % len(data) + cut :],
        whole, st.integers(0, 1 << 16), st.integers(0, 3), st.binary(max_size=4),
    )  # fmt: skip
    return st.one_of(whole, damaged)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Programs with AddressSanitizer and UndefinedBehaviorSanitizer."""
    os.environ.update(OPTIONS)
    made = Place(sanitized=True)
    yield made
    made.close()
    for name in OPTIONS:
        del os.environ[name]


@pytest.fixture(scope="module")
def guest(place: Place) -> Path:
    """The guest's end, likewise; outside of a machine."""
    return Path(shutil.copy(shim_build.sanitized_guest_alone(), place.directory / "guest-sanitized"))


def throw(fake: Fake, data: bytes, *words: tuple[str, bytes]) -> None:
    """Send these bytes as the guest, then have the broker say these words and kill; no more comes of the guest."""
    for at in range(0, len(data), 7000):
        fake.guest.raw(data[at : at + 7000])
    with contextlib.suppress(OSError):
        for word in words:
            fake.keeper.channel.send(*word)
        fake.keeper.channel.send("K")
    fake.guest.connection.shutdown(socket.SHUT_WR)


@given(data=streams("HPRYEZMODCFATLQN?"), started=st.booleans())
@OURS
def test_a_guests_bytes_never_break_the_keeper(place: Place, data: bytes, started: bool) -> None:
    """Whatever a guest sends, the keeper ends it or lives on and obeys; its memory is never wrong."""
    fake = Fake(place, jail=False)
    (theirs_in, given_end), (out, theirs_out) = os.pipe(), os.pipe()
    try:
        if started:
            fake.running([theirs_in, theirs_out, theirs_out])
        else:
            fake.guest.joined()
        throw(fake, data)
        assert fake.keeper.over(10) in {*range(99), *range(100, 256)}
    finally:
        for fd in (theirs_in, given_end, out, theirs_out):
            os.close(fd)
        fake.close()


@given(data=streams("HPRYEZMODCFATLQN?"), adopted=st.booleans())
@OURS
def test_a_kept_guests_bytes_never_break_the_keeper(place: Place, data: bytes, adopted: bool) -> None:
    """The same of a guest that goes on: before its agent is adopted, or behind that and amid a standstill."""
    fake = Fake(place, "--adopt", "7", jail=False)
    (theirs_in, given_end), (out, theirs_out) = os.pipe(), os.pipe()
    try:
        fake.guest.joined([b"commands=0,1,7"])
        fake.guest.until("B")
        if adopted:
            fake.guest.send("P", frames.encode_list([b"restored=renewed"]))
            fake.keeper.until("P")
            fake.keeper.channel.send("G", u32(2), [theirs_in, theirs_out, theirs_out])
            fake.guest.until("G")
            fake.keeper.channel.send("Q")
        throw(fake, data, ("Q", b"\0"))
        assert fake.keeper.over(10) in {*range(99), *range(100, 256)}
    finally:
        for fd in (theirs_in, given_end, out, theirs_out):
            os.close(fd)
        fake.close()


@given(data=streams("IHPRYEZMODCFATLQN?"), honest=st.booleans())
@OURS
def test_a_guests_bytes_on_its_new_connection_never_break_the_keeper(place: Place, data: bytes, honest: bool) -> None:
    """The same of one that is met again: in place of its session's nonce, or behind that."""
    fake = Fake(place, jail=False)
    (theirs_in, given_end), (out, theirs_out) = os.pipe(), os.pipe()
    try:
        fake.running([theirs_in, theirs_out, theirs_out])
        fake.keeper.channel.send("Q")
        fake.guest.until("Q")
        fake.guest.send("Q")
        fake.keeper.until("Q")
        fake.keeper.channel.send("Q", b"\0")
        fake.met()
        fake.guest.until("I")
        if honest:
            fake.guest.send("I", fake.guest.nonce)
        throw(fake, data)
        assert fake.keeper.over(10) in {*range(99), *range(100, 256)}
    finally:
        for fd in (theirs_in, given_end, out, theirs_out):
            os.close(fd)
        fake.close()


@pytest.mark.slow
@given(data=streams("JBGXSMWUTQIKODCFA?"), begun=st.booleans(), then=st.sampled_from(["", "another", "again"]))
@OURS
def test_a_hosts_bytes_never_break_pid_1_of_a_guest(guest: Path, data: bytes, begun: bool, then: str) -> None:
    """The host is trusted, and yet: no frame of whatever shape is a memory error in PID 1."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [*WALLS.split(), *PLACE.split(), "--ro-bind", str(guest), str(guest), "--",
         str(guest), "guest", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        **as_user(),
    )  # fmt: skip
    theirs.close()
    with ours, contextlib.suppress(OSError):
        ours.settimeout(0.1)
        ours.sendall(framed("J", u32(PROTOCOL) + bytes(16)))
        if begun:
            inner = [b"/guest", b"inner", b"--unit", b"--ctl", b"0", b"--egress", b"/run/cloister/box/egress.sock"]
            ours.sendall(framed("B", frames.encode_list([b"uid=1", b"socket=s"]) + frames.encode_list(inner)))
            ours.sendall(framed("F", u32(2)) + framed("G", u32(0) + order(["/bin/cat"], ENVIRONMENT, "/")))
        if begun and then == "again":
            ours.sendall(framed("Q", b"") + framed("I", bytes(16)))
        if begun and then == "another":
            ours.sendall(framed("Q", b"") + framed("J", u32(PROTOCOL) + bytes(16)))
            ours.sendall(framed("B", frames.encode_list([b"uid=1"]) + frames.encode_list([b"x"])) + framed("F", u32(2)))
            ours.sendall(framed("G", u32(2)))
        ours.sendall(data)
        while ours.recv(1 << 16):  # until it is silent: by then it has read everything
            pass
    _, complaints = process.communicate(timeout=20)
    assert b"Sanitizer" not in complaints, complaints
    assert b"runtime error" not in complaints, complaints
    assert process.returncode != SANITIZER_EXIT


def test_the_sanitizers_would_tell(place: Place) -> None:
    """The measure itself: the program under test is the sanitized one."""
    assert shutil.which("nm"), "nm of binutils is needed"
    symbols = subprocess.run(["nm", "-D", str(place.shim)], capture_output=True, check=True).stdout
    assert b"__asan_init" in symbols
