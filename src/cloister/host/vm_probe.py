"""Whether a machine of this host boots a guest, and how soon: asked by booting one.

The guest is an image's own kernel and first process with the word `cloister.probe` on its command line: it says one
line on its console and powers off, without a disk, a channel or anything of a run. A /dev/kvm that opens, or even makes
machines, proves nothing: there are hosts on which such a guest is silent for minutes (whose own kernel is a guest of a
kind that KVM cannot nest in). What it is not: the choice; `runs/vm_accelerator.py` makes it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

HELLO = b"cloister: hello from a guest"
"""What PID 1 of the guest prints (shim/guest_init.c)."""
FIRST_WORD_S = 5.0
"""A guest that has printed nothing by then is not waited for."""
BOUND_S = 10.0
EMULATED_S = 60.0
"""Both bounds where the guest is emulated: a loaded host takes long, and there is nothing else to choose."""

_MAX_OUTPUT = 64 << 10
_LAST = 200
KVM = "/dev/kvm"


class Heard(NamedTuple):
    """What came of one boot."""

    seconds: float
    """From the start of the monitor to the guest's word; 0 where it never came."""
    why: str = ""
    """Why not."""


def hear(argv: Sequence[str], *, first_word_s: float = FIRST_WORD_S, bound_s: float = BOUND_S) -> Heard:
    """Start a monitor whose guest prints to standard output, and wait for its word; it is killed in any case."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(  # the argv is ours (isolation/qemu.py)
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return Heard(0, f"it cannot be started: {error.strerror}")
    with process:
        try:
            return _listen(process, started, first_word_s, bound_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)


def _listen(process: subprocess.Popen[bytes], started: float, first_word_s: float, bound_s: float) -> Heard:
    output = b""
    pipe = process.stdout.fileno() if process.stdout else -1
    while HELLO not in output:
        until = started + (bound_s if output else first_word_s)
        left = until - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            said = f"said nothing for {first_word_s:g} s" if not output else f"did not come up within {bound_s:g} s"
            return Heard(0, f"a guest {said}")
        data = os.read(pipe, 4096)
        if not data or len(output) > _MAX_OUTPUT:
            return Heard(0, f"the monitor ended: {_last_line(output)}")
        output += data
    return Heard(time.monotonic() - started)


def _last_line(output: bytes) -> str:
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    text = lines[-1] if lines else "without a word"
    return "".join(char if char.isprintable() else "?" for char in text)[-_LAST:]


def why_not_kvm() -> str:
    """Return why KVM need not even be tried; empty where it is worth a boot."""
    if not os.path.exists(KVM):
        return f"there is no {KVM}"
    if not os.access(KVM, os.R_OK | os.W_OK, effective_ids=True):
        return f"{KVM} may not be opened"
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    if "vmx" not in flags and "svm" not in flags:
        return "the processor has neither vmx nor svm"
    return ""


def cpuinfo() -> str:
    """Return the text of /proc/cpuinfo."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return file.read()


def boot_id() -> str:
    """Return what the kernel calls the time since its start: a cached answer is as old as that at most."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
