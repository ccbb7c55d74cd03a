"""The broker: one process per user that compiles, launches and supervises that user's runs.

Started on demand by the command line, ends when it has been idle for a while. It listens on
one Unix socket in a directory of mode 0700 and checks the peer's uid as well. It is not a
sandbox itself and holds no more power than its user; every run is bound to it, so that
killing it ends them (fail closed).

This file is the process: lock, socket, loop, signals. What requests mean is in `requests`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import signal
import socket
import struct
import sys
import time

from cloister.errors import CloisterError, RetryError, render
from cloister.host.owner import identify
from cloister.host.secrets_memory import keep_memory_private
from cloister.policy.first_use import look_at_types
from cloister.runs.paths import Paths, locate
from cloister.services.connection import Connection
from cloister.services.requests import Requests
from cloister.services.uncaught import log_exception

IDLE_S = 300.0
_BACKLOG = 64


class Broker:
    """The listening socket and its connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, idle_s: float) -> None:
        """Recover what a killed broker left, then get ready to serve."""
        self._loop = loop
        self._paths = paths
        self._idle_s = idle_s
        self._busy_until = time.monotonic() + idle_s
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()
        self.stopped = loop.create_future()
        self.requests = Requests(loop, paths, identify(paths.home))

    def listen(self) -> None:
        """Open the socket. The lock is held already, so a socket that is there is dead."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._paths.broker_socket)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._paths.broker_socket)
        os.chmod(self._paths.broker_socket, 0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        self._loop.add_reader(listener.fileno(), self._accept)
        self._loop.call_later(min(self._idle_s, 5.0), self._look_idle)

    async def close(self) -> None:
        """Stop listening, end every run, and undo it."""
        if self._listener:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._paths.broker_socket)
        await self.requests.close()

    def stop(self) -> None:
        """End `serve`."""
        if not self.stopped.done():
            self.stopped.set_result(None)

    def _accept(self) -> None:
        assert self._listener is not None  # noqa: S101  # the reader exists only while it does
        with contextlib.suppress(OSError):
            while True:
                try:
                    sock, _ = self._listener.accept()
                except BlockingIOError:
                    return
                if _peer_uid(sock) != os.getuid():
                    sock.close()
                    continue
                self._busy_until = time.monotonic() + self._idle_s
                connection = self.requests.accept(sock, self._forget)
                self._connections.add(connection)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._busy_until = time.monotonic() + self._idle_s

    def _look_idle(self) -> None:
        if not self._connections and not self.requests.busy and time.monotonic() >= self._busy_until:
            self.stop()
            return
        self._loop.call_later(min(self._idle_s, 5.0), self._look_idle)


def _peer_uid(sock: socket.socket) -> int:
    """Return who is at the other end, by the kernel's word (unix(7), SO_PEERCRED)."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def prepare_runtime(directory: str) -> None:
    """Make the runtime directory, and refuse one that somebody else could reach into.

    Raises:
        RetryError: it is not ours, or open to others.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    info = os.lstat(directory)
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise RetryError("runtime-unsafe", "the runtime directory must belong to you, mode 0700", where=directory,
                         remedy=f"chmod 700 {directory}")  # fmt: skip


def take_lock(directory: str) -> int | None:
    """Return the descriptor that holds the broker's lock, or None when another broker has it."""
    descriptor = os.open(f"{directory}/broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def main(argv: list[str] | None = None) -> int:
    """Serve until idle, told to stop, or out of luck."""
    parser = argparse.ArgumentParser(prog="cloister-broker", description="Serve this user's runs.")
    parser.add_argument("--ready-fd", type=int, default=-1, help="descriptor that gets one byte once it listens")
    parser.add_argument("--idle-s", type=float, default=float(os.environ.get("CLOISTER_BROKER_IDLE_S", IDLE_S)))
    options = parser.parse_args(argv)
    os.umask(0o077)
    owner = identify(os.environ.get("HOME", ""))
    paths = locate(os.environ, owner.home, owner.uid)
    try:
        prepare_runtime(paths.runtime)
        os.makedirs(paths.state, mode=0o700, exist_ok=True)
        lock = _lock_or_other(paths)
        if lock is None:
            _ready(options.ready_fd)
            return 0
        if os.getsid(0) != os.getpid():
            os.setsid()
        return _serve(paths, options)
    except CloisterError as error:
        sys.stderr.write(render(error) + "\n")
        return error.exit_code


def _serve(paths: Paths, options: argparse.Namespace) -> int:
    os.environ.setdefault("UV_THREADPOOL_SIZE", "16")  # libuv resolves names in its pool; four threads are soon full
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a bulk tunnel takes up to ten descriptors
    keep_memory_private()
    look_at_types()
    import uvloop

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        broker = Broker(loop, paths, options.idle_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, broker.stop)
        loop.set_exception_handler(log_exception)
        broker.listen()
        _ready(options.ready_fd)
        _become_quiet(paths)
        gc.freeze()  # what is loaded now stays: nothing of it needs to be looked through again
        try:
            await broker.stopped
        finally:
            await broker.close()

    uvloop.run(serve())
    return 0


def _become_quiet(paths: Paths) -> None:
    """Leave the caller's terminal: from here on messages go to a log, cut at each start."""
    log = os.open(f"{paths.state}/broker.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 2)
    os.close(log)
    os.chdir("/")


def _ready(descriptor: int) -> None:
    if descriptor >= 0:
        with contextlib.suppress(BrokenPipeError):  # whoever started us was told to stop; the next one finds us
            os.write(descriptor, b"1")
        os.close(descriptor)


def _lock_or_other(paths: Paths) -> int | None:
    """Return the descriptor that holds the lock; None when another broker has it, and answers.

    That one may not listen yet, since two commands at once may both try to start one; or it may be ending.

    Raises:
        RetryError: it does neither within five seconds.
    """
    for _ in range(100):
        lock = take_lock(paths.runtime)
        if lock is not None:
            return lock
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(paths.broker_socket)
            return None
        time.sleep(0.05)
    raise RetryError("broker-stuck", "another broker holds the lock but does not answer", where=paths.broker_socket)


if __name__ == "__main__":
    sys.exit(main())
