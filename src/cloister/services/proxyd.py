"""`cloister-proxyd`, the system's broker: `python -I -m cloister.services.proxyd`, as the user `cloister-proxy`.

systemd listens for it (sd_listen_fds(3)) on a socket that only root may open, and each peer's uid is looked at
as well. It compiles the system's policy for hostd, serves egress and model calls of all units, and
keeps their records. It has no power over units: hostd makes and ends them. When it ends, so does every run: the
shim of a unit leaves with its channel. This file is the process: socket, loop, signals.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import stat
import struct
import sys

from cloister.errors import CloisterError, RetryError, render
from cloister.host.owner import Owner, identify
from cloister.host.secrets_memory import keep_memory_private
from cloister.plan.unit import ETC, HOSTD_SOCKET, PROXY_RUNTIME, PROXY_STATE
from cloister.policy.first_use import look_at_types
from cloister.runs.paths import Paths
from cloister.runs.unit_prepare import system_paths
from cloister.services.broker import prepare_runtime, take_lock
from cloister.services.proxyd_requests import SystemRequests
from cloister.services.uncaught import log_exception

_FIRST_LISTENER = 3
_BACKLOG = 256


class Proxyd:
    """The listening socket and what comes over it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, requests: SystemRequests) -> None:
        """Get ready; answer nobody yet."""
        self._loop, self._listener = loop, listener
        self.requests = requests
        self.stopped = loop.create_future()
        listener.setblocking(False)

    def serve(self) -> None:
        """Begin to accept."""
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        """End the process."""
        if not self.stopped.done():
            self.stopped.set_result(None)

    async def close(self) -> None:
        """End every run, and undo our part of it."""
        self._loop.remove_reader(self._listener.fileno())
        await self.requests.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                try:
                    sock, _ = self._listener.accept()
                except BlockingIOError:
                    return
                if peer_uid(sock) != 0:
                    sock.close()
                    continue
                self.requests.accept(sock)


def peer_uid(sock: socket.socket) -> int:
    """Return who is at the other end, by the kernel's word (unix(7), SO_PEERCRED)."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def listener(path: str) -> socket.socket:
    """Return the socket that systemd opened for us, or open one at `path`.

    Raises:
        RetryError: there is none.
    """
    if path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(_BACKLOG)
        return sock
    activated = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    if not activated or not stat.S_ISSOCK(os.fstat(_FIRST_LISTENER).st_mode):
        raise RetryError(
            "proxyd-no-socket", "the system's broker is started by its socket",
            remedy="systemctl start cloister-proxyd.socket",
        )  # fmt: skip
    os.set_inheritable(_FIRST_LISTENER, False)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return socket.socket(fileno=_FIRST_LISTENER)


def notify_ready() -> None:
    """Tell the service manager that requests are answered (sd_notify(3)); nobody hears it outside of systemd."""
    place = os.environ.pop("NOTIFY_SOCKET", "")
    if not place.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(f"\0{place[1:]}" if place.startswith("@") else place)
        sock.send(b"READY=1")


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    parser = argparse.ArgumentParser(prog="cloister-proxyd", description="Serve the runs of units.")
    parser.add_argument("--socket", default="", help="listen here instead of on systemd's socket")
    parser.add_argument("--config", default=ETC, help="directory of the policy")
    parser.add_argument("--state", default=PROXY_STATE, help="directory of the records")
    parser.add_argument("--runtime", default=PROXY_RUNTIME, help="directory of the runs' sockets")
    parser.add_argument("--hostd", default=HOSTD_SOCKET, help="where hostd listens")
    options = parser.parse_args(argv)
    os.umask(0o077)
    paths = system_paths(options.config, options.state, options.runtime)
    try:
        prepare_runtime(paths.runtime)
        os.makedirs(paths.state, mode=0o700, exist_ok=True)
        if take_lock(paths.runtime) is None:
            raise RetryError("proxyd-runs", "the system's broker runs already", where=paths.runtime)
        return _serve(listener(options.socket), paths, identify(paths.state), options.hostd)
    except CloisterError as error:
        sys.stderr.write(render(error) + "\n")
        return error.exit_code


def _serve(sock: socket.socket, paths: Paths, owner: Owner, hostd: str) -> int:
    os.environ.setdefault("UV_THREADPOOL_SIZE", "16")  # libuv resolves names in its pool; four threads are soon full
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a bulk tunnel takes up to ten descriptors
    keep_memory_private()
    look_at_types()
    import uvloop

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        proxyd = Proxyd(loop, sock, SystemRequests(loop, paths, owner, hostd))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, proxyd.stop)
        loop.add_signal_handler(signal.SIGHUP, proxyd.requests.reload)
        loop.set_exception_handler(log_exception)
        await proxyd.requests.recover_units()  # before any new run, which hostd must not take for a left one
        await proxyd.requests.serve_gateways()
        proxyd.serve()
        notify_ready()
        gc.freeze()  # what is loaded now stays: nothing of it needs to be looked through again
        try:
            await proxyd.stopped
        finally:
            await proxyd.close()

    uvloop.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
