"""Starting the children of `disk_child`, one of them before there is work for it: Python needs 60 ms to import.

A child waits for its request, a socket's message with descriptors, and works once. It ends with the thread that made it
(PR_SET_PDEATHSIG, asked for by the shim before Python starts) and with our end of the socket. A spare has seen no
request and no descriptor before its own, so it is what a fresh child is.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from cloister.host.memory_file import memory_file

IDLE_S = 300.0
"""A spare that nobody has taken for so long is ended: it has some 15 MiB."""
_SHIM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim", "cloister-shim")
_PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from cloister.host.child_main import main; main(sys.argv[2:])"
_LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")


class Child:
    """One that waits for its request. Whoever has it reads `process.stdout`, then kills it and waits for it."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Start it; it imports `modules` before it waits.

        Raises:
            OSError: it cannot be started.
        """
        argv = [_SHIM, "tied", str(os.getpid()), sys.executable, "-I", "-c", _PROGRAM, _PACKAGES, *modules]
        environment = {name: os.environ[name] for name in _LOCALE if name in os.environ} | {"PATH": "/usr/bin:/bin"}
        self._ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                argv, stdin=theirs.fileno(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._ours.close()
            raise
        finally:
            theirs.close()

    def give(self, request: bytes, descriptors: Sequence[int]) -> None:
        """Give it its request, with descriptors that it gets for its own. One that has died says so by its output.

        Raises:
            OSError: there is no room for it; the child is ended.
        """
        try:
            text = memory_file("request", request)
            try:
                with suppress(BrokenPipeError, ConnectionResetError):
                    socket.send_fds(self._ours, [b"\0"], [text, *descriptors])
            finally:
                os.close(text)
        except OSError:
            self.end()
            raise
        self._ours.close()

    def end(self) -> None:
        """End one that has no work."""
        self._ours.close()
        self.process.kill()
        self.process.communicate()


class Spares:
    """One child that waits in this process for work, and a thread that lives as long as this process and makes it."""

    def __init__(self, modules: Sequence[str], idle_s: float = IDLE_S) -> None:
        """Make nothing yet."""
        self._modules, self._idle_s = tuple(modules), idle_s
        self._changed = threading.Condition()
        self._wanted = self._serving = False
        self._spare: Child | None = None

    def want(self) -> None:
        """Have one made, if there is none: work is near."""
        with self._changed:
            if not self._serving:
                threading.Thread(target=self._serve, name="spare-child", daemon=True).start()
                self._serving = True
            self._wanted = True
            self._changed.notify()

    def take(self) -> Child | None:
        """Return the one that waits, and have another made; None where there is none."""
        with self._changed:
            spare, self._spare = self._spare, None
        self.want()
        if spare is not None and spare.process.poll() is not None:  # somebody has killed it
            spare.end()
            return None
        return spare

    def _serve(self) -> None:
        while True:
            with self._changed:
                wanted = self._changed.wait_for(lambda: self._wanted, self._idle_s)
                self._wanted = False
                idle = None if wanted else self._spare
                if idle:
                    self._spare = None
                make = wanted and self._spare is None
            if idle:
                idle.end()
            if make:
                with suppress(OSError):  # then each starts its own, and says why that does not go
                    made = Child(self._modules)
                    with self._changed:
                        self._spare = made
