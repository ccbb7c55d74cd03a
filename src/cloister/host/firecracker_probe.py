"""Whether a Firecracker boots a guest here: which version it is, and a boot of an image's kernel by a file of settings.

There is no API, no disk and no channel: the guest greets on the console and powers off (`vm_probe`). Which monitor a
run gets is for `runs/vm_monitor.py` to say.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable

import msgspec

from cloister.host import kept_answer, vm_probe

_CMDLINE = "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests cloister.probe"
_MEMORY_MIB = 128
_VERSION_S = 10.0
BOUND_S = 30.0
"""Generous: it is asked where the policy names Firecracker, and the answer is kept."""
_MAX_VERSION = 80
WORDS = f"trying whether Firecracker boots a guest here: at most {BOUND_S:g} s, once after each start of this host"


def _quietly(words: str) -> None:
    """Tell nobody."""
    del words


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    version: str
    """As the program says it; empty where it says none."""
    seconds: float = 0
    """From its start to the guest's word; 0 where that never came."""
    why: str = ""
    """Why not."""


def probe(program: str, kernel: str, initramfs: str, kept: str, trying: Callable[[str], None] = _quietly) -> Verdict:
    """Return whether it boots, from `kept` where this program and this image were tried since the host's start.

    Args:
        program: path of Firecracker.
        kernel: of an image.
        initramfs: of the same image.
        kept: a file in the user's runtime directory.
        trying: told in words what is about to be tried; what it raises is passed on.
    """
    identities = (*map(kept_answer.identity, (program, kernel, initramfs)),)
    about = (vm_probe.boot_id(), *(word for one in identities for word in one))
    if found := kept_answer.recall(kept, about, Verdict):
        return found
    trying(WORDS)
    verdict = try_boot(program, kernel, initramfs)
    kept_answer.keep(kept, about, verdict)
    return verdict


def try_boot(program: str, kernel: str, initramfs: str, *, bound_s: float = BOUND_S) -> Verdict:
    """Boot the guest, and return what came of it."""
    version = ask_version(program)
    if not version:
        return Verdict(version="", why="it does not say its version")
    settings = {
        "boot-source": {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": _CMDLINE},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": _MEMORY_MIB},
    }
    with tempfile.NamedTemporaryFile("w", prefix="cloister-", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        argv = (program, "--no-api", "--config-file", file.name)
        heard = vm_probe.hear(argv, first_word_s=bound_s, bound_s=bound_s)
    return Verdict(version=version, seconds=heard.seconds, why=heard.why)


def ask_version(program: str) -> str:
    """Return what the program says of its version; empty where it says nothing."""
    try:
        said = subprocess.run(
            (program, "--version"), stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said[:_MAX_VERSION].decode("utf-8", "replace").partition("\n")[0].strip()
