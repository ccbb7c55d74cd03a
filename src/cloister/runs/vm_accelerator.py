"""Which accelerator a guest gets: KVM where it was seen to boot one, else emulation.

The answer of a boot is kept until the host's next one, for exactly this monitor and this image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from cloister.host import kept_answer, vm_probe
from cloister.isolation.qemu import clock_khz, probe_argv
from cloister.plan.vm import Accelerator

Trying = Callable[[str], None]
"""Told in words what is about to be tried by booting a guest, where no answer is kept; what it raises is passed on."""
WORDS = (
    f"trying whether KVM boots a guest here: at most {vm_probe.BOUND_S:g} s, once after each start of this host, "
    "for each image"
)


def quietly(words: str) -> None:
    """Tell nobody."""
    del words


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


def accelerator(program: str, guest: Guest, runtime: str, trying: Trying = quietly) -> Verdict:
    """Return the accelerator for runs on this host.

    Args:
        program: path of QEMU.
        guest: what to boot where KVM is worth a try; its bytes are those of an image, and it gets nothing else.
        runtime: the user's own directory, gone after a reboot, where the answer is kept.
        trying: called before a boot.
    """
    why = vm_probe.why_not_kvm()
    if why:
        return Verdict(accelerator="tcg", why=why)
    about = (vm_probe.boot_id(), *kept_answer.identity(program), guest.manifest)
    path = f"{runtime}/accelerator.json"
    if kept := kept_answer.recall(path, about, Verdict):
        return kept
    trying(WORDS)
    heard = vm_probe.hear(probe_argv(program, "kvm", guest.kernel, guest.initramfs, clock=0))
    if heard.seconds:
        verdict = Verdict(accelerator="kvm", seconds=heard.seconds)
    else:
        verdict = Verdict(accelerator="tcg", why=f"KVM boots nothing here: {heard.why}")
    kept_answer.keep(path, about, verdict)
    return verdict


def boot_time(program: str, guest: Guest, chosen: Accelerator) -> vm_probe.Heard:
    """Boot once more and measure, for the doctor."""
    if chosen == "kvm":
        return vm_probe.hear(probe_argv(program, chosen, guest.kernel, guest.initramfs, clock=0))
    argv = probe_argv(program, chosen, guest.kernel, guest.initramfs, clock=clock_khz(vm_probe.cpuinfo()))
    return vm_probe.hear(argv, first_word_s=vm_probe.EMULATED_S, bound_s=vm_probe.EMULATED_S)
