"""Which accelerator a guest gets: KVM where it was seen to boot one, else emulation.

The answer of a boot is kept until the host's next one, for exactly this monitor and this image.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import msgspec

from cloister.host import private_files, vm_probe
from cloister.isolation.qemu import clock_khz, probe_argv
from cloister.plan.vm import Accelerator


class Guest(NamedTuple):
    """What is booted to find out: paths of an image's files, and the digest of its manifest."""

    kernel: str
    initramfs: str
    manifest: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Which one, and why."""

    accelerator: Accelerator
    why: str = ""
    """Why not KVM."""
    seconds: float = 0
    """What the boot took that showed it; 0 where none was needed."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    about: tuple[str, ...]
    verdict: Verdict


def accelerator(program: str, guest: Guest, runtime: str) -> Verdict:
    """Return the accelerator for runs on this host.

    Args:
        program: path of QEMU.
        guest: what to boot where KVM is worth a try; its bytes are those of an image, and it gets nothing else.
        runtime: the user's own directory, gone after a reboot, where the answer is kept.
    """
    why = vm_probe.why_not_kvm()
    if why:
        return Verdict(accelerator="tcg", why=why)
    about = (vm_probe.boot_id(), *_identity(program), guest.manifest)
    path = f"{runtime}/accelerator.json"
    if kept := _read(path, about):
        return kept
    heard = vm_probe.hear(probe_argv(program, "kvm", guest.kernel, guest.initramfs, clock=0))
    if heard.seconds:
        verdict = Verdict(accelerator="kvm", seconds=heard.seconds)
    else:
        verdict = Verdict(accelerator="tcg", why=f"KVM boots nothing here: {heard.why}")
    _write(path, _Kept(about=about, verdict=verdict))
    return verdict


def boot_time(program: str, guest: Guest, chosen: Accelerator) -> vm_probe.Heard:
    """Boot once more and measure, for the doctor."""
    if chosen == "kvm":
        return vm_probe.hear(probe_argv(program, chosen, guest.kernel, guest.initramfs, clock=0))
    argv = probe_argv(program, chosen, guest.kernel, guest.initramfs, clock=clock_khz(vm_probe.cpuinfo()))
    return vm_probe.hear(argv, first_word_s=vm_probe.EMULATED_S, bound_s=vm_probe.EMULATED_S)


def _identity(path: str) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return path, str(info.st_dev), str(info.st_ino), str(info.st_size), str(info.st_mtime_ns), str(info.st_ctime_ns)
    return (path,)


def _read(path: str, about: tuple[str, ...]) -> Verdict | None:
    with contextlib.suppress(msgspec.MsgspecError):
        kept = msgspec.json.decode(private_files.read(path) or b"", type=_Kept)
        return kept.verdict if kept.about == about else None
    return None


def _write(path: str, kept: _Kept) -> None:
    """Keep it; where that fails, the next run finds out again."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with private_files.locked(os.path.dirname(path)):
            private_files.replace(path, msgspec.json.encode(kept))
