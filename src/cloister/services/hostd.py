"""`cloister-hostd`: root's part of runs under systemd. `python -I -m cloister.services.hostd`.

systemd listens for it (sd_listen_fds(3)) and starts it with the first request; it ends when nobody asked for a
while. Every request is served by a process of its own, forked from this one, which is warm and has one
thread: a hostile caller can trouble only that. This file is the process: listening, forking, counting,
reaping. What a request means is in `hostd_request`. It imports `host`, `plan` and `errors` alone, so that
no code that reads policies runs as root.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import grp
import os
import pwd
import select
import signal
import socket
import stat
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cloister.errors import CloisterError, RetryError, render
from cloister.host import unit_records, unit_start
from cloister.host.frames import encode
from cloister.host.unit_caller import peer_uid
from cloister.host.unit_wire import refusal
from cloister.services import hostd_request, hostd_tap

IDLE_S = 60.0
PER_CALLER = 16
IN_ALL = 256
WAITING_EACH, WAITING = 112, 512
"""Beyond what is served at once, so many of a user and of all wait for their turn. A user's runs are bounded too."""
LONGEST_S = 180.0
"""A child that is older has met something that does not answer, such as a file system of its caller's."""
_FIRST_LISTENER = 3
_BACKLOG = 64
_TICK_S = 1.0
_KEPT = 32
_LAST_S = 10.0


class Child(NamedTuple):
    """A process that serves a request; uid -1 is ourselves, looking for what is left over."""

    uid: int
    until: float


class Spare(NamedTuple):
    """A process that was forked ahead of the next request, and waits for its connection at the other end of `sock`."""

    pid: int
    sock: socket.socket


class Daemon:
    """The listening socket and the children."""

    def __init__(self, listener: socket.socket, manager: unit_start.Manager, idle_s: float = IDLE_S) -> None:
        """Get ready."""
        listener.setblocking(False)
        self._listener = listener
        self._manager = manager
        self._idle_s = idle_s
        self._children: dict[int, Child] = {}
        self._turned_away: deque[socket.socket] = deque(maxlen=_KEPT)
        self._waiting: deque[tuple[int, socket.socket]] = deque()
        self._leaving = False
        self._spare: Spare | None = None
        hear, say = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signals = hear
        signal.set_wakeup_fd(say, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._leave)

    def serve(self) -> None:
        """Serve until nobody asked for a while, or until told to end."""
        self._fork(-1, None)  # what a killed one left
        quiet_since = time.monotonic()
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        while not self._leaving:
            ready = {descriptor for descriptor, _ in poll.poll(_TICK_S * 1000)}
            with contextlib.suppress(BlockingIOError):
                os.read(self._signals, 4096)
            if self._reap():
                self._serve_waiting()
                self._fork_ahead()
            if not ready:
                self._turned_away.clear()
            if self._listener.fileno() in ready:
                self._accept()
            if ready or self._children:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > self._idle_s:
                break
        self._drop_spare()
        until = time.monotonic() + _LAST_S
        while self._children and time.monotonic() < until:  # what is under way is finished; the rest is undone later
            self._reap()
            time.sleep(0.05)

    def _leave(self, *_: object) -> None:
        self._leaving = True

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it left again, or we are short of descriptors: the others wait
        uid = peer_uid(sock)
        if self._has_room(uid):
            self._serve(uid, sock)
        elif len(self._waiting) < WAITING and sum(uid == other for other, _ in self._waiting) < WAITING_EACH:
            self._waiting.append((uid, sock))
        else:
            self._turn_away(sock)

    def _has_room(self, uid: int) -> bool:
        requests = [child for child in self._children.values() if child.uid >= 0]
        return len(requests) < IN_ALL and sum(child.uid == uid for child in requests) < self._share(uid)

    def _serve(self, uid: int, sock: socket.socket) -> None:
        if not self._hand_to_spare(uid, sock):
            self._fork(uid, sock)
        if sock not in self._turned_away:
            sock.close()

    def _serve_waiting(self) -> None:
        """Serve whose turn it is; of each user in the order in which they came."""
        for _ in range(len(self._waiting)):
            uid, sock = self._waiting.popleft()
            if self._has_room(uid):
                self._serve(uid, sock)
            else:
                self._waiting.append((uid, sock))

    def _turn_away(self, sock: socket.socket) -> None:
        """Send somebody away, but keep the connection: what is still being sent must not fail before they read."""
        error = RetryError("hostd-busy", "too many requests at once", remedy="try again in a moment")
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.send(encode("F", refusal(error)), socket.MSG_NOSIGNAL)
        self._turned_away.append(sock)  # the oldest of too many goes, and is closed with that

    @staticmethod
    def _share(uid: int) -> int:
        """How many requests of one uid are served at once. The system's own end runs: they are not turned away."""
        return IN_ALL if uid == 0 or uid < _FIRST_PERSON else PER_CALLER

    def _fork(self, uid: int, sock: socket.socket | None) -> None:
        try:
            pid = os.fork()
        except OSError:
            if sock is not None:
                self._turn_away(sock)
            return
        if pid == 0:
            self._serve_one(lambda: sock)
        self._children[pid] = Child(uid, time.monotonic() + LONGEST_S)

    def _fork_ahead(self) -> None:
        """Fork for the next request while nobody waits: that takes as long as some requests themselves."""
        if self._spare or self._children or self._leaving:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            return
        if pid == 0:
            ours.close()
            self._serve_one(lambda: _connection_over(theirs))
        theirs.close()
        self._spare = Spare(pid, ours)

    def _hand_to_spare(self, uid: int, sock: socket.socket) -> bool:
        """Give a request to the process that was forked ahead; return whether there is one that takes it."""
        if self._spare is None:
            return False
        (pid, link), self._spare = self._spare, None
        self._children[pid] = Child(uid, time.monotonic() + LONGEST_S)
        with link:
            try:
                socket.send_fds(link, [b"!"], [sock.fileno()])
            except OSError:  # it was killed; the end of it is met as that of any child
                return False
        return True

    def _drop_spare(self) -> None:
        if self._spare:
            self._spare.sock.close()
            os.waitpid(self._spare.pid, 0)
            self._spare = None

    def _serve_one(self, take: Callable[[], socket.socket | None]) -> None:
        """Be the child, for the connection that `take` returns; for none, look for what is left. Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._listener.close()
            os.close(self._signals)
            if self._spare:
                self._spare.sock.close()  # its only other end is the parent's
            for other in (*self._turned_away, *(waiting for _, waiting in self._waiting)):
                other.close()
            sock = take()
            if sock is None:
                hostd_tap.tidy()
                unit_records.recover(self._manager)
            else:
                hostd_request.serve(sock, self._manager)
            code = 0
        except CloisterError as error:
            sys.stderr.write(render(error) + "\n")
        except BaseException:  # noqa: BLE001  whatever it was: the journal shall have it, and the parent must know
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> bool:
        """Collect children that have ended; return whether there were any."""
        ended = False
        for pid, child in list(self._children.items()):
            if child.until < time.monotonic():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            del self._children[pid]
            ended = True
            if status != 0 and child.uid >= 0 and not self._leaving:
                self._fork(-1, None)  # it died half-way: somebody must undo what it had begun
        return ended


_FIRST_PERSON = 1000


def _connection_over(link: socket.socket) -> socket.socket:
    """Wait for a connection from the parent. Ends this process when there is none to come."""
    with link:
        data, descriptors, _, _ = socket.recv_fds(link, 1, 1)
    if not data or not descriptors:
        os._exit(0)
    return socket.socket(fileno=descriptors[0])


def _look_up_somebody() -> None:
    """Have the C library load what it needs to look up people, so that no child has to (nsswitch.conf(5))."""
    entry = pwd.getpwuid(0)
    os.getgrouplist(entry.pw_name, entry.pw_gid)
    grp.getgrgid(entry.pw_gid)


def _listener(path: str) -> socket.socket:
    """Return the socket that systemd opened for us, or open one (tests).

    Raises:
        RetryError: there is none.
    """
    if path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o666)  # noqa: S103  anybody may ask; who they are is the kernel's word
        sock.listen(_BACKLOG)
        return sock
    activated = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    if not activated or not stat.S_ISSOCK(os.fstat(_FIRST_LISTENER).st_mode):
        raise RetryError(
            "hostd-no-socket", "hostd is started by its socket", remedy="systemctl start cloister-hostd.socket"
        )
    os.set_inheritable(_FIRST_LISTENER, False)
    return socket.socket(fileno=_FIRST_LISTENER)


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; return its exit status."""
    parser = argparse.ArgumentParser(prog="cloister-hostd", description=__doc__)
    parser.add_argument("--socket", default="", help="listen here instead of on systemd's socket")
    parser.add_argument("--idle-s", type=float, default=IDLE_S, help="end after so many seconds without a request")
    options = parser.parse_args(argv)
    os.umask(0o077)
    try:
        daemon = Daemon(_listener(options.socket), unit_start.find_manager(), options.idle_s)
    except CloisterError as error:
        sys.stderr.write(render(error) + "\n")
        return error.exit_code
    _look_up_somebody()
    gc.collect()
    gc.freeze()  # children share these pages
    daemon.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
