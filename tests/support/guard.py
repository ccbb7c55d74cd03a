"""The guard of tests that may not touch the machine: a CPython audit hook that ends the test at once.

Not a mock: it sees what the interpreter really does, whichever library asked for it (PEP 578;
the events are in "Audit events table" of the Python library reference). The exception derives
from BaseException, so no `except Exception` under test can hide it. A hook cannot be removed,
so it is added once and looks at a switch. Reading files is allowed; writing only below the
temporary folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSED_FAMILIES = ("subprocess.", "ctypes.", "pty.", "ftplib.", "http.client.", "smtplib.", "urllib.", "webbrowser.")
REFUSED = frozenset(
    {
        *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile"),
        *("os.kill", "os.killpg", "signal.pthread_kill", "os.chroot", "os.setxattr", "os.removexattr"),
        *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"),
        *("socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo", "socket.sethostname"),
    }
)
WRITES_PATHS = frozenset(
    {
        *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"),
        *("os.truncate", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree"),
    }
)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TouchedTheMachineError(BaseException):
    """A test in a folder that promises not to touch the machine did so."""


class Guard:
    """The switch and the judgement; `install` connects it to the interpreter."""

    def __init__(self) -> None:
        self.armed = False
        self.writable = (tempfile.gettempdir(), "/dev/null")

    def install(self) -> None:
        """Add the hook; it stays for the life of the process and does nothing while not armed."""
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self, basetemp: Path) -> Iterator[None]:
        """Arm the guard for the length of the block; files may be written below `basetemp`."""
        self.writable = (tempfile.gettempdir(), str(basetemp), "/dev/null")
        self.armed = True
        try:
            yield
        finally:
            self.armed = False

    def objection(self, event: str, arguments: tuple[object, ...]) -> str:
        """Return why an audit event is refused; empty if it is not."""
        if event in REFUSED or event.startswith(REFUSED_FAMILIES):
            return f"{event}{arguments[:2]!r}"
        if event == "open" and _writes(arguments) and not self._may_write(arguments[0]):
            return f"writes to {arguments[0]!r}"
        if event in WRITES_PATHS:
            paths = [item for item in arguments[:2] if isinstance(item, str | bytes)]
            # A link's first path is what it points at, which may be anything.
            changed = paths[-1:] if event in {"os.symlink", "os.link", "shutil.copyfile"} else paths
            if not all(self._may_write(path) for path in changed):
                return f"{event} {changed!r}"
        return ""

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.armed and (reason := self.objection(event, arguments)):
            raise TouchedTheMachineError(reason)

    def _may_write(self, path: object) -> bool:
        if isinstance(path, int):
            return True
        full = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        if "/__pycache__" in full or "/.hypothesis" in full:
            return True  # Python's own, written at a first import; and hypothesis's tables of characters
        return any(full == place or full.startswith(place + "/") for place in self.writable)


def _writes(arguments: tuple[object, ...]) -> bool:
    """Tell whether an `open` event (path, mode, flags) opens for writing."""
    mode = arguments[1]
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & WRITE_FLAGS)
