"""Whether Firecracker really boots a guest here: asked by booting one, since a /dev/kvm that opens proves nothing.

The guest is an image's own kernel and first process without any disk: it greets on the console and powers off. There is
no API and no channel, and nothing of the answer is believed but that it came.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from typing import NamedTuple

import msgspec

BOOTS_S = 20.0
"""Longer than an emulated guest takes on a loaded machine; with KVM it is a fraction of a second."""
SAYS = b"cloister: hello"
"""What the guest's first process says (`guest_init.c`) before it powers off."""
_CMDLINE = "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests cloister.probe"
_MEMORY_MIB = 128
_MAX_OUTPUT = 64 * 1024
_VERSION_S = 10.0


class Guest(NamedTuple):
    """What is booted."""

    kernel: str
    initramfs: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    version: str
    """As the program says it; empty where it says none."""
    boots: bool
    seconds: float
    why: str = ""
    """What it said last, where it does not boot."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict, and what it was about."""

    about: list[str]
    verdict: Verdict


def probe(program: str, guest: Guest, kept: str) -> Verdict:
    """Return whether it boots, from `kept` where that very program and kernel were tried since the host's start.

    Args:
        program: path of Firecracker.
        guest: what to boot.
        kept: a file in the user's runtime directory; made anew where it is about something else.
    """
    about = [_boot(), program, _identity(program), _identity(guest.kernel), _identity(guest.initramfs)]
    with contextlib.suppress(OSError, msgspec.MsgspecError), open(kept, "rb") as file:
        found = msgspec.json.decode(file.read(_MAX_OUTPUT), type=_Kept)
        if found.about == about:
            return found.verdict
    verdict = try_boot(program, guest)
    _keep(kept, _Kept(about=about, verdict=verdict))
    return verdict


def try_boot(program: str, guest: Guest) -> Verdict:
    """Boot the guest, and return what came of it."""
    version = _ask_version(program)
    if not version:
        return Verdict(version="", boots=False, seconds=0.0, why="it does not say its version")
    config = {
        "boot-source": {
            "kernel_image_path": guest.kernel,
            "initrd_path": guest.initramfs,
            "boot_args": _CMDLINE,
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": _MEMORY_MIB},
    }
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("w", prefix="cloister-", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        status, said = _run([program, "--no-api", "--config-file", file.name], BOOTS_S)
    seconds = time.monotonic() - began
    if status is None:
        return Verdict(version=version, boots=False, seconds=seconds, why=f"its guest hung for {BOOTS_S:g} s")
    boots = status == 0 and SAYS in said
    last = said.decode("utf-8", "replace").strip().rpartition("\n")[2][-200:]
    return Verdict(version=version, boots=boots, seconds=seconds, why="" if boots else last or f"status {status}")


def _ask_version(program: str) -> str:
    status, said = _run([program, "--version"], _VERSION_S)
    return said.decode("utf-8", "replace").partition("\n")[0].strip()[:80] if status == 0 else ""


def _run(argv: list[str], timeout_s: float) -> tuple[int | None, bytes]:
    """Run something to its end; return its status (none: it was killed) and the end of what it printed."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={"PATH": "/usr/bin:/bin"},
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, str(error.strerror).encode()
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _MAX_OUTPUT))
        return status, output.read()


def _boot() -> str:
    """Return what is another after each start of the host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _identity(path: str) -> str:
    """Return what changes with a file."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def _keep(path: str, kept: _Kept) -> None:
    """Write it for the next time; where that fails, the next time asks again."""
    with contextlib.suppress(OSError):
        descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(kept))
        os.replace(f"{path}.new", path)
