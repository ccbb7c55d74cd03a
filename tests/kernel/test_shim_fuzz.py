"""Random and half-right frames into both halves, built with sanitizers: no crash, no hang, no agent."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from shim_rig import Rig, Run, order, rig_of_test

import shim_build
from cloister.host import frames

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

CRASH = (b"AddressSanitizer", b"runtime error", b"LeakSanitizer")
KINDS = "BQGTFSXKPZ"


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The shim with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return shim_build.sanitized_shim()


def some_payload(dice: random.Random) -> bytes:
    """Return bytes that are often nearly right: numbers, lists, and damage."""
    payload = b""
    for _ in range(dice.randrange(6)):
        match dice.randrange(4):
            case 0:
                payload += frames.encode_u32(dice.choice([0, 1, 2, 3, 255, 1 << 31, 0xFFFFFFFF]))
            case 1:
                words = [dice.randbytes(dice.randrange(9)) for _ in range(dice.randrange(5))]
                payload += frames.encode_list(words)
            case 2:
                payload += frames.encode_list(dice.choice([[], [b"/nonexistent"], [b"?", b"yn", b"n"], [b"x=y"] * 4]))
            case _:
                payload += dice.randbytes(dice.randrange(12))
    return payload


def some_bytes(dice: random.Random) -> bytes:
    """Return a stream of frames, sometimes damaged."""
    data = b"".join(frames.encode(dice.choice(KINDS), some_payload(dice)) for _ in range(dice.randrange(1, 4)))
    if dice.random() < 0.4:
        place = dice.randrange(len(data))
        data = data[:place] + dice.randbytes(dice.randrange(4)) + data[place + dice.randrange(3) :]
    return data


def ended(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for the end and return stderr. A `T` frame stops the outer half, rightly: keep it going."""
    for _ in range(100):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.2)[1]
        process.send_signal(signal.SIGCONT)
    raise AssertionError("the half does not end")


@pytest.mark.parametrize("half", ["outer", "inner"])
def test_hostile_bytes_end_in_125_or_an_ordinary_code(sanitized: Path, half: str, tmp_path: Path) -> None:
    """Whatever arrives, the half leaves by itself soon after the end of the stream, without a sanitizer report."""
    dice = random.Random(2026)  # noqa: S311 - the same dice every time
    environment = {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "exitcode=99:halt_on_error=1"}
    for _ in range(120):
        ours, theirs = socket.socketpair()
        options = [str(theirs.fileno())] if half == "outer" else ["--ctl", str(theirs.fileno()), "--egress", "/none"]
        process = subprocess.Popen(
            [str(sanitized), half, *options], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True, cwd=tmp_path,
        )  # fmt: skip
        theirs.close()
        data = some_bytes(dice)
        try:
            with Path(os.devnull).open("rb") as null:
                socket.send_fds(ours, [data[:1]], [null.fileno()] * dice.randrange(18))
            ours.sendall(data[1:])
        except (BrokenPipeError, ConnectionResetError):
            pass
        ours.close()
        err = ended(process)
        assert process.returncode not in {99, -6, -11, -7}, (data, err)
        assert not any(mark in err for mark in CRASH), (data, err)


def test_hostile_frames_to_a_running_inner_half(sanitized: Path, rig: Rig) -> None:
    """After go too: damaged exec, signal and unknown frames end the sandbox or are obeyed, without a report."""
    dice = random.Random(7)  # noqa: S311 - the same dice every time
    copy = Path(shutil.copy(sanitized, rig.directory / "sanitized"))
    log = rig.work / "report"
    argv = "/usr/bin/bwrap --unshare-all --die-with-parent --as-pid-1 --ro-bind / / --proc /proc --dev /dev --bind"
    words = [*argv.split(), str(rig.work), str(rig.work), "--seccomp", "4", "--cap-drop", "ALL"]
    words += ["--setenv", "ASAN_OPTIONS", f"detect_leaks=0:log_path={log}", "--", str(copy), "inner", "--ctl", "3"]
    words += ["--egress", str(rig.relay.path), "--listen", "127.0.0.1:3128"]
    for _ in range(25):
        run = Run(rig, argv=words)
        run.go("sleep", "60")
        run.until("inner", "R")
        with contextlib.suppress(frames.FrameError), Path(os.devnull).open("r+b") as null:
            for _ in range(dice.randrange(1, 6)):
                kind, payload = dice.choice("XXXSSPQ"), some_payload(dice)
                if kind == "X" and dice.random() < 0.5:
                    command = dice.choice([["true"], [""], ["sleep", "9"], ["\udcff" * dice.randrange(400)]])
                    payload = frames.encode_u32(dice.randrange(1, 4)) + frames.encode_u32(dice.randrange(2))
                    payload += order(command, [b"PATH=/usr/bin::x", dice.randbytes(9).replace(b"\0", b"")], "/")
                run.inner.send(kind, payload, [null.fileno()] * dice.choice([0, 3, 3, 3, 5]))
                run.turn(0.01)
        run.inner.close()
        run._on_closed("inner")
        assert run.wait() in {125, 137, 143}
        run.close()
        assert not list(rig.work.iterdir()), next(rig.work.iterdir()).read_text()


def test_the_sanitizer_would_see_a_mistake(sanitized: Path, tmp_path: Path) -> None:
    """The net holds: the sanitized build really is one."""
    del tmp_path
    assert b"__asan_init" in sanitized.read_bytes()
