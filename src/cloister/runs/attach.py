"""A run's direct network while it lasts: pasta comes, the sandbox goes, the counters are read.

    N (namespace and rules are there) ──▶ pasta started ──ready──▶ G with pasta's pidfd
                                               └── ended ──▶ the run ends: 125

pasta ends when the run does. Two hold its pidfd, the broker and the outer half of the shim, so
that each kills it when the other is killed; for the case that both are, a record in the run's
runtime directory lets the next broker do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

from cloister.egress.nft import Counts, counts
from cloister.host import pasta

_NOISE = ("Failed to send",)
"""pasta tells stderr when there is no syslog to tell."""


class Attachment:
    """One run's pasta, and what the packet filter counted."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        argv: tuple[str, ...],
        directory: str,
        on_ready: Callable[[int], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Take pasta's argv and the run's runtime directory; start nothing.

        Args:
            loop: where descriptors are watched.
            argv: as in the plan.
            directory: for the record.
            on_ready: called once with pasta's pidfd, which stays ours.
            on_failed: called once with a text when there is no network, or no more.
        """
        self.counted: Counts | None = None
        self._loop = loop
        self._argv = argv
        self._directory = directory
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._started: pasta.Started | None = None
        self._up = False
        self._over = False

    def namespace_ready(self, pid: int) -> None:
        """Start pasta for the namespaces of this process."""
        if self._started is not None or self._over:
            return
        try:
            self._started = pasta.start(self._argv, pid)
            pasta.record(self._directory, self._started.pid)
        except OSError as error:
            self._fail(f"{self._argv[0]}: {error.strerror}")
            return
        self._loop.add_reader(self._started.ready, self._readable)
        self._loop.add_reader(self._started.pidfd, self._ended)

    def report(self, text: bytes) -> None:
        """Keep the counters that the outer half read in the end."""
        with contextlib.suppress(ValueError):
            self.counted = counts(text)

    def close(self) -> None:
        """End pasta. It is collected when the loop sees it end."""
        self._over = True
        if self._started is not None:
            pasta.end(self._started.pidfd)

    def collect(self, patience_s: float = 2.0) -> None:
        """End pasta and wait for it, without the loop."""
        self.close()
        until = time.monotonic() + patience_s
        while self._started is not None and time.monotonic() < until:
            if os.waitpid(self._started.pid, os.WNOHANG)[0]:
                self._forget()
            else:
                time.sleep(0.005)

    def _readable(self) -> None:
        assert self._started is not None  # noqa: S101  # the reader exists only while it does
        said = _read(self._started.ready)
        self._loop.remove_reader(self._started.ready)
        if said and not self._over:
            self._up = True
            self._on_ready(self._started.pidfd)

    def _ended(self) -> None:
        assert self._started is not None  # noqa: S101  # the reader exists only while it does
        words = _read(self._started.words).decode("utf-8", "replace")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._started.pid, os.WNOHANG)
        self._forget()
        lines = [line for line in words.splitlines() if line and not line.startswith(_NOISE)]
        self._fail("; ".join(lines[-3:]) or ("it was killed" if self._up else "it gave no reason"))

    def _forget(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            for descriptor in (started.ready, started.words, started.pidfd):
                self._loop.remove_reader(descriptor)
                os.close(descriptor)

    def _fail(self, why: str) -> None:
        if not self._over:
            self._over = True
            self._on_failed(
                f"pasta ended, and the network with it: {why}" if self._up else f"pasta did not start: {why}"
            )


def _read(descriptor: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 65536)
    return b""
