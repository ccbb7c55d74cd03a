"""`cloister-auditd`, the keeper of the system's log: `python -I -m cloister.services.auditd`, as `cloister-audit`.

Everybody may connect to its socket; who they are is the kernel's word (SO_PEERCRED), and what they may say depends on
it (`audit_peers`). It reads the rings of the sensor where there is one. One thread: what came in is written with one
write, then confirmed. While the log cannot be written nothing is read and nothing confirmed, so sources keep what they
have and obey `on_failure`. It has no capability and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable

import msgspec

from cloister.audit.chain import encode
from cloister.errors import CloisterError, RetryError, render
from cloister.host.audit_log import Log
from cloister.host.sensor_ask import SENSOR_SOCKET
from cloister.plan.unit import AUDIT_KEYS, AUDIT_LOG, AUDIT_SOCKET
from cloister.policy.first_use import look_at_types
from cloister.policy.load import load
from cloister.policy.model import Audit
from cloister.policy.units import parse_duration, parse_size
from cloister.runs.audit_detections import Order, Watch
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.paths import SYSTEM_POLICY
from cloister.runs.policies import read_trusted, stamp
from cloister.services.audit_peers import Peer, Peers
from cloister.services.kernel_source import Source

_FIRST_LISTENER = 3
_BACKLOG = 128
_TICK_S = 1.0
_RETRY_S = 0.5


class Auditd:
    """The socket, the peers, and the keeper behind them."""

    def __init__(self, listener: socket.socket, keeper: Keeper, rules: DetectionRules | None = None) -> None:
        """Open the log; `rules` are what is detected in it.

        Raises:
            CloisterError: there is another keeper, or the place is not safe.
            OSError: it cannot be written.
        """
        self._listener, self.keeper = listener, keeper
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self.peers = Peers()
        self._batch: list[bytes] = []
        self._owed: list[Peer] = []
        """Peers whose frames are in the batch."""
        self._failing = ""
        self._leaving = self._new_key = False
        self._next_tick = 0.0
        self.kernel: Source | None = None
        """The rings of the kernel, drained into the keeper."""
        self._waited: tuple[int, ...] = ()
        keeper.tiers = self._told
        keeper.open()
        self.peers.recall(keeper.latest())
        self._rules = rules
        if rules:
            rules.begin(keeper, self._order)
        keeper.wake()
        keeper.head("opened")

    def serve(self) -> None:
        """Serve until told to end."""
        hear, say = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(say, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGUSR1, self._want_new_key)
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too large fails, and is told
        self._selector.register(hear, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        notify("READY=1")
        while not self._leaving:
            self._turn(hear)
        with contextlib.suppress(OSError):
            self._flush()
        if self._rules:
            self._rules.close()
        self.keeper.close()

    def _leave(self, *_: object) -> None:
        self._leaving = True

    def _want_new_key(self, *_: object) -> None:
        self._new_key = True

    def _turn(self, hear: int) -> None:
        more = self._follow_kernel()
        ready = self._selector.select(0 if more else _RETRY_S if self._failing else _TICK_S)
        for key, _ in ready:
            if isinstance(key.data, Peer):
                if not self._failing:
                    self._hear(key.data)
            elif key.fd == hear:
                with contextlib.suppress(BlockingIOError):
                    os.read(hear, 4096)
            elif key.fileobj is self._listener:
                self._accept()
        try:
            self._flush()
            self._tick()
        except (OSError, CloisterError) as error:
            self._fail(str(error))
            time.sleep(0.05)  # peers that wait would make this loop spin

    def _told(self) -> dict[str, str | int | float | bool]:
        return {**self.peers.told(), **(self.kernel.heads() if self.kernel else {})}

    def _follow_kernel(self) -> bool:
        """Move what waits in the rings into the log, and wait for their next; return whether there is more."""
        if self.kernel is None or self._failing:
            return False
        try:
            more = self.kernel.turn()
        except (OSError, CloisterError) as error:
            self._fail(str(error))
            return False
        if self.kernel.descriptors != self._waited:
            for descriptor in self._waited:
                with contextlib.suppress(KeyError, ValueError, OSError):
                    self._selector.unregister(descriptor)
            self._waited = self.kernel.descriptors
            for descriptor in self._waited:
                self._selector.register(descriptor, selectors.EVENT_READ, self.kernel)
        return more

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            if peer := self.peers.admit(sock):
                self._selector.register(sock, selectors.EVENT_READ, peer)

    def _hear(self, peer: Peer) -> None:
        try:
            taken = peer.receive()
        except OSError:
            self._drop(peer)
            return
        if taken is None:
            return
        self._batch += taken
        self._owed.append(peer)

    def _flush(self) -> None:
        """Write what came in, then confirm it.

        Raises:
            OSError: it could not be written; it stays.
        """
        batch = [*self._batch, *map(encode, self.peers.lost())]
        if batch:
            try:
                self.keeper.put(batch)
            except OSError:
                self._batch = batch
                raise
        self._batch = []
        if self._failing:
            why, self._failing = self._failing, ""
            self.keeper.say("log.trouble", "the log can be written again", {"why": why}, severity=4)
            notify("STATUS=")
        owed, self._owed = self._owed, []
        for peer in dict.fromkeys(owed):
            try:
                peer.confirm()
            except OSError:
                self._drop(peer)

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_S
            if self._rules:
                self._rules.look()
            self.keeper.tick()
            if self._new_key:
                self.keeper.new_key()
                self._new_key = False
            notify("WATCHDOG=1")

    def _fail(self, why: str) -> None:
        if not self._failing:
            sys.stderr.write(f"<2>the audit log cannot be written: {why}\n")
            sys.stderr.flush()
            notify(f"STATUS=The log cannot be written: {why}")
        self._failing = why or "unknown"
        now = time.monotonic()
        if now >= self._next_tick:  # alive, and says so: a restart would not make room on the disk
            self._next_tick = now + _TICK_S
            notify("WATCHDOG=1")

    def _order(self, order: Order) -> None:
        """Tell those who may own a run that it is to be stopped: the system's broker, and its person's own."""
        payload = msgspec.json.encode(order)
        for key in list(self._selector.get_map().values()):
            peer = key.data
            if isinstance(peer, Peer) and (peer.account.trusted or peer.account.name == order.user):
                with contextlib.suppress(OSError):  # it left, or does not read: its next frame tells
                    peer.order(payload)

    def _drop(self, peer: Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.sock)
        self.peers.leave(peer)


class DetectionRules:
    """The detections of a policy file, in force from the next look after it changes."""

    def __init__(self, policy: str, memory: str) -> None:
        """Read nothing yet; what was seen is remembered in the directory `memory`."""
        self._policy, self._memory = policy, memory
        self._stamp = (0, 0, 0)
        self._watch: Watch | None = None
        self._keeper: Keeper | None = None

    def begin(self, keeper: Keeper, ordered: Callable[[Order], None]) -> None:
        """Look at what this keeper writes; a policy with mistakes is said in the log, and obeyed when it is mended."""
        self._keeper = keeper
        self._watch = Watch(keeper, Audit(), self._memory, ordered, source="auditd")
        self.look()

    def look(self) -> None:
        """Obey the policy, where its file has changed."""
        now = stamp(self._policy)
        if now == self._stamp or self._watch is None or self._keeper is None:
            return
        self._stamp = now
        try:
            source = read_trusted(self._policy, os.geteuid())
            self._watch.obey(load(source.text, self._policy).audit if source else Audit())
        except CloisterError as error:
            self._keeper.say(
                "log.trouble", f"the policy's detections are not in force: {error.message}", {}, severity=4
            )

    def close(self) -> None:
        """Remember what was seen."""
        if self._watch:
            self._watch.close()


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without one nobody is told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def listen(path: str) -> socket.socket:
    """Return the socket that systemd opened for us, or open one (tests).

    Raises:
        RetryError: there is none.
    """
    if path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o666)  # noqa: S103  anybody may report; who they are is the kernel's word
        sock.listen(_BACKLOG)
        return sock
    activated = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    if not activated or not stat.S_ISSOCK(os.fstat(_FIRST_LISTENER).st_mode):
        raise RetryError("auditd-no-socket", "auditd is started with its socket", where=AUDIT_SOCKET,
                         remedy="systemctl start cloister-auditd.socket")  # fmt: skip
    os.set_inheritable(_FIRST_LISTENER, False)
    return socket.socket(fileno=_FIRST_LISTENER)


def main(argv: list[str] | None = None) -> int:
    """Keep the log; return the exit status."""
    parser = argparse.ArgumentParser(prog="cloister-auditd", description="Keep the system's audit log.")
    parser.add_argument("--socket", default="", help="listen here instead of on systemd's socket")
    parser.add_argument("--log", default=AUDIT_LOG, help="directory of the log")
    parser.add_argument("--keys", default=AUDIT_KEYS, help="directory of the signing key")
    parser.add_argument("--sensor", default=SENSOR_SOCKET, help="socket of the sensor of kernel events")
    parser.add_argument("--rotate-size", default="64M")
    parser.add_argument("--rotate-every", default="1d")
    parser.add_argument("--retention", default="90d")
    parser.add_argument("--policy", default=SYSTEM_POLICY, help="the policy whose detections are in force")
    options = parser.parse_args(argv)
    os.umask(0o027)
    look_at_types()
    rotate_s, retention_s = float(parse_duration(options.rotate_every)), float(parse_duration(options.retention))
    try:
        rules = Rules(parse_size(options.rotate_size), rotate_s, retention_s)
        keeper = Keeper(Log(options.log, mode=0o640), options.keys, rules)
        daemon = Auditd(listen(options.socket), keeper, DetectionRules(options.policy, options.keys))
    except (CloisterError, OSError) as error:
        shown = render(error) if isinstance(error, CloisterError) else f"cloister: the audit log: {error}"
        sys.stderr.write(f"{shown}\n")
        return error.exit_code if isinstance(error, CloisterError) else 75
    daemon.kernel = Source(daemon.keeper, options.sensor)
    daemon.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
