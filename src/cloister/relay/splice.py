"""Bulk transfer inside the kernel: one direction of a tunnel, moved by splice(2) through a pipe.

Bytes never enter this process, which costs about a third of the CPU of reading and writing
them. A pump works on duplicates of the two descriptors while the event loop's own transports
are not reading; it reads only when its pipe is empty, so its memory is one pipe. Whether bytes
may flow at all was decided before; ends and errors are reported to the tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable

BULK = 1 << 20
"""Bytes of one direction after which a pump is worth its four descriptors."""
_PIPE = 256 * 1024
_F_SETPIPE_SZ = 1031  # fcntl(2); fcntl.F_SETPIPE_SZ is missing in some builds of Python


class Pump:
    """Moves bytes until the source ends or either side fails."""

    def __init__(
        self, source: int, sink: int, moved: Callable[[int], None], ended: Callable[[OSError | None], None]
    ) -> None:
        """Duplicate the descriptors and make the pipe; `start` begins.

        Args:
            source: descriptor to read, not blocking, with nothing buffered elsewhere.
            sink: descriptor to write, not blocking, with nothing buffered elsewhere.
            moved: told how many bytes were taken from the source.
            ended: told once that the source has ended (None) or what failed; the pump is closed then.

        Raises:
            OSError: when no descriptor is left; the tunnel then goes on without a pump.
        """
        self._loop = asyncio.get_running_loop()
        self._moved, self._ended = moved, ended
        self._pending = 0
        with contextlib.ExitStack() as stack:
            self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, self._out)
            stack.callback(os.close, self._in)
            with contextlib.suppress(OSError):  # over the user's pipe quota: the default size works too
                fcntl.fcntl(self._in, _F_SETPIPE_SZ, _PIPE)
            self._source = os.dup(source)
            stack.callback(os.close, self._source)
            self._sink = os.dup(sink)
            stack.callback(os.close, self._sink)
            self._close = stack.pop_all()

    def start(self) -> None:
        """Begin to read."""
        self._loop.add_reader(self._source, self._readable)

    def close(self) -> None:
        """Stop, at once; safe to call again."""
        if self._source >= 0:
            self._loop.remove_reader(self._source)
            self._loop.remove_writer(self._sink)
            self._source = -1
            self._close.close()

    def _readable(self) -> None:
        """Take what the source has, and pass it on."""
        try:
            taken = os.splice(self._source, self._in, _PIPE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._finish(error)
            return
        if not taken:
            self._finish(None)
            return
        self._pending = taken
        self._moved(taken)
        if not self._drain() and self._source >= 0:
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._writable)

    def _writable(self) -> None:
        """Go on after the sink was full."""
        if self._drain():
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._readable)

    def _drain(self) -> bool:
        """Empty the pipe into the sink; say whether it is empty and the pump still open."""
        try:
            while self._pending:
                self._pending -= os.splice(self._out, self._sink, self._pending)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._finish(error)
            return False
        return True

    def _finish(self, error: OSError | None) -> None:
        """Close and report."""
        self.close()
        self._ended(error)
