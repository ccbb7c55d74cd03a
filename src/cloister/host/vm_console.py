"""What a guest printed on its console, and what that says of its end. Its monitor, which wrote it, is not trusted."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping

from cloister.plan.vm import CONSOLE

_MOST_BYTES = 1 << 20
_LAST_WORDS = 300
_LOOKED_AT = 64 << 10
_CORRUPT = ("dm-verity", "verity:")
_PANIC = "Kernel panic"
_TRY = "cloister logs --console last"
_ENDS = {
    "guest-protocol": ("guest-protocol", "the guest broke the protocol of its channel, so its machine was ended"),
    "monitor-ended": ("monitor-died", "the virtual machine's monitor ended before the agent did"),
    "guest-ended": ("guest-ended", "the guest ended before the agent did"),
    "guest-silent": ("guest-silent", "the guest did not answer in time"),
    "begin-failed": ("guest-failed", "the guest could not be made ready"),
}


def verdict(words: Mapping[str, str], printed: str = "") -> tuple[str, str]:
    """Return reference and text for how a machine ended.

    Args:
        words: the keeper's.
        printed: the last of what the guest printed: a kernel that stops says why, and then much else.
    """
    reference, text = _ENDS.get(words.get("reason", ""), ("monitor-died", "the virtual machine ended"))
    console = words.get("console", "")
    panic = next((line for line in (*printed.splitlines(), console) if _PANIC in line), "")
    if panic:
        reference, text, console = "guest-panicked", "the guest's kernel stopped", panic
    if any(mark in panic for mark in _CORRUPT):
        reference, text = "guest-corrupt", "the image is not what was signed, so the guest's kernel stopped"
    lines = [f"cloister: {text} [{reference}]"]
    if words.get("text"):
        lines.append(f"  where: {words['text'][:_LAST_WORDS]}")
    if console:
        lines.append(f"  console: {console[-_LAST_WORDS:]}")
    return reference, "\n".join([*lines, f"  try: {_TRY}"])


def last_words(directory: str) -> str:
    """Return the last of what a guest printed, from the directory of its monitor."""
    return (_read(f"{directory}/{CONSOLE}.1") + _read(f"{directory}/{CONSOLE}"))[-_LOOKED_AT:].decode(
        "utf-8", "replace"
    )


def keep(directory: str, target: str) -> None:
    """Copy the end of a console to where it is kept; nothing there is fine. No link is followed."""
    older, newer = _read(f"{directory}/{CONSOLE}.1"), _read(f"{directory}/{CONSOLE}")
    if not older and not newer:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError), os.fdopen(os.open(target, flags, 0o600), "wb") as file:
        file.write((older + newer)[-_MOST_BYTES:])


def _read(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return b""
        size = os.fstat(descriptor).st_size
        file.seek(max(0, size - _MOST_BYTES))
        return file.read(_MOST_BYTES)
