"""What seccomp's user notification tells of a run's processes: frames `N` of the inner half, turned into the audit.

The fallback for hosts without the kernel's own events (`[audit] fallback`), for guests of microVMs, where the host's
kernel sees nothing, and for digests of what is executed (`[audit] hashes`). It records what a call asked for: another
thread may change the arguments before the kernel reads them (seccomp_unotify(2)). Called in the broker's loop; files
are read in a thread. Whoever speaks here is hostile, so all is bounded: what exceeds a rate is counted and told.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from cloister.host.frames import FrameError, decode_list
from cloister.plan.unit import RUNTIME
from cloister.policy.model import Audit

Demand = Literal["", "calls", "files"]
LONGEST = 32 << 10
"""Bytes of one frame."""
PER_SECOND = 500
BURST = 5_000
HASH_BYTES = 1 << 30
"""Larger files have no digest."""
_WAITING = 64
"""Files that may wait for their digest; of more there is none."""
_HEAD = 9
_CONNECT = 3
_CALLS = {1: "execve", 2: "execveat"}
_CACHE = 512


class _Identity(NamedTuple):
    """When two looks at a file are looks at the same bytes."""

    device: int
    inode: int
    size: int
    changed_ns: int
    modified_ns: int


_digests: dict[_Identity, str] = {}


def demand(audit: Audit, *, sensor: str = f"{RUNTIME}/sensor.sock", guest: bool = False) -> Demand:
    """Return what is to be told: nothing, calls, or calls with the files that are executed.

    Args:
        audit: the policy's.
        sensor: where the kernel's own events are asked for; where it is, there is no need of a fallback.
        guest: the run has a kernel of its own, which no sensor of the host looks into.
    """
    if audit.hashes:
        return "files"
    if audit.fallback == "seccomp" and (guest or not os.path.exists(sensor)):
        return "calls"
    return ""


class Notices:
    """The notices of one run."""

    def __init__(
        self, tell: Callable[[str, dict[str, Any]], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Have `tell(kind, fields)` called for each, and for each second in which some were left out."""
        self._tell, self._clock = tell, clock
        self._left, self._filled = float(BURST), clock()
        self._lost, self._lost_at = 0, 0.0
        self._waiting = 0

    def take(self, payload: bytes, descriptors: tuple[int, ...]) -> None:
        """Handle one frame; the descriptors are ours from now on, and closed in the end."""
        file = os.dup(descriptors[0]) if len(descriptors) == 1 else -1
        told = None if not self._within_rate() else _read(payload)
        if told is None:
            if file >= 0:
                os.close(file)
            return
        kind, fields = told
        if file < 0 or self._waiting >= _WAITING:
            if file >= 0:
                os.close(file)
            self._tell(kind, fields)
            return
        self._waiting += 1
        asked = asyncio.get_running_loop().run_in_executor(None, digest, file)
        asked.add_done_callback(lambda done: self._hashed(kind, fields, done))

    def _hashed(self, kind: str, fields: dict[str, Any], done: asyncio.Future[str]) -> None:
        self._waiting -= 1
        self._tell(kind, fields if done.cancelled() or done.exception() else {**fields, "hash": done.result()})

    def _within_rate(self) -> bool:
        now = self._clock()
        self._left = min(BURST, self._left + (now - self._filled) * PER_SECOND)
        self._filled = now
        if self._left >= 1:
            self._left -= 1
            if self._lost and now - self._lost_at >= 1:
                self.flush()
            return True
        self._lost_at = self._lost_at if self._lost else now
        self._lost += 1
        return False

    def flush(self) -> None:
        """Tell what was left out since the last time."""
        if self._lost:
            count, self._lost = self._lost, 0
            self._tell("notices-lost", {"count": count, "time": time.time()})


def digest(file: int) -> str:
    """Return the SHA-256 of an open file, in hex, and close it; empty for what is none or too large.

    The same file is not read twice: its identity has the time of its last change, which only root could forge.
    """
    import hashlib  # the broker of a run without digests needs none

    try:
        before = os.fstat(file)
        if not stat.S_ISREG(before.st_mode) or before.st_size > HASH_BYTES:
            return ""
        identity = _identity(before)
        if found := _digests.get(identity):
            return found
        with open(file, "rb", closefd=False) as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        after = _identity(os.fstat(file))
    except OSError:
        return ""
    finally:
        os.close(file)
    if after != identity:
        return ""  # it was written meanwhile: no digest is better than one of a mixture
    if len(_digests) >= _CACHE:
        _digests.pop(next(iter(_digests)), None)
    _digests[identity] = found
    return found


def _identity(found: os.stat_result) -> _Identity:
    return _Identity(found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns)


def _read(payload: bytes) -> tuple[str, dict[str, Any]] | None:
    """Return kind and fields of a frame; None for one that says nothing we know."""
    if not _HEAD < len(payload) <= LONGEST:
        return None
    pid, parent, call = int.from_bytes(payload[:4], "little"), int.from_bytes(payload[4:8], "little"), payload[8]
    try:
        items, _ = decode_list(payload, _HEAD)
    except FrameError:
        return None
    if len(items) < 3:  # noqa: PLR2004  # name, path, and directory or address
        return None
    fields: dict[str, Any] = {
        "time": time.time(), "pid": pid, "parent": parent, "name": _text(items[0]), "path": _text(items[1]),
    }  # fmt: skip
    if call in _CALLS:
        return "executed", fields | {"directory": _text(items[2]), "words": [_text(item) for item in items[3:]]}
    if call == _CONNECT and (endpoint := _endpoint(items[2])):
        return "connected", fields | endpoint
    return None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _endpoint(address: bytes) -> dict[str, Any]:
    """Return where an address leads (connect(2), struct sockaddr); nothing for none, as of AF_UNSPEC."""
    family = int.from_bytes(address[:2], "little")
    port = int.from_bytes(address[2:4], "big")
    if family == socket.AF_INET and len(address) >= 8:  # noqa: PLR2004  # ip(7)
        return {"ip": socket.inet_ntop(socket.AF_INET, address[4:8]), "port": port}
    if family == socket.AF_INET6 and len(address) >= 24:  # noqa: PLR2004  # ipv6(7)
        return {"ip": socket.inet_ntop(socket.AF_INET6, address[8:24]), "port": port}
    if family == socket.AF_UNIX:
        named = address[2:]
        shown = f"@{_text(named[1:])}" if named[:1] == b"\0" else _text(named.split(b"\0")[0])
        return {"socket": shown}
    return {"family": family} if family else {}
