"""`cloister-sensor` (`python -I -m cloister.services.sensor`) loads the BPF programs of the audit, and reads no event.

The keeper of the log connects and gets the rings' descriptors; hostd and users' brokers ask for runs to be watched.
Each is known by the kernel's word (SO_PEERCRED). The rings outlive a reader: what happens while the keeper restarts
waits in them. A watch is told to the keeper before it is in force, so no event comes of a run that it does not know.
A sensor that is restarted goes on with the watches of the one before (`sensor_store`), and tells which were unseen.

It has root's uid and CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN only. Calls of the whole host cost a little while the
tracepoints are attached, so these are there only while something is watched, and for a minute after.

    R  keeper → sensor: the rings, please   →   R  JSON `Rings` · critical, bulk
    W  sensor → keeper: JSON `Told`, a watch that is about to be in force
    N  sensor → keeper: JSON why; there are no kernel events here
    L  sensor → keeper: JSON `Sums`, when something of it was lost      E  the same, when a watch is over
    M  sensor → keeper: JSON `Missed`, when the kernel left programs out
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import pwd
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from cloister.audit.calls import Wanted, shapes
from cloister.errors import CloisterError, StepError, render
from cloister.host import kernel_watches
from cloister.host.frames import Channel, Frame, FrameError
from cloister.host.kernel_programs import Counters, Outcome, Programs
from cloister.host.sensor_ask import SENSOR_SOCKET, Missed, Rings, Sums, Told
from cloister.runs import kernel_tiers
from cloister.services import sensor_store
from cloister.services.auditd import listen, notify

LINGER_S = 60.0
"""Tracepoints of calls stay attached so long after the last watch: attaching and detaching costs the whole host."""
PER_UID = 32
"""Watches of one user at once."""
_TICK_S = 1.0
_ENDED = 1024
_FIELDS = frozenset({"run", "agent", "user", "account"})
_FIELD_BYTES = 256


class _Watch:
    """A watch that is in force."""

    def __init__(self, told: Told, key: int, level: int, uid: int) -> None:
        self.told, self.key, self.level, self.uid = told, key, level, uid
        self.lost = (0, 0)
        """What was told of its losses."""
        self.descriptor = -1
        """A cgroup's; -1 for a namespace, whose watch ends with the connection."""


class _Said(msgspec.Struct, frozen=True):
    """What is kept of a watch besides descriptors."""

    number: int
    uid: int
    fields: dict[str, str]


class _Peer:
    """A connection, and who is at its other end."""

    def __init__(self, sock: socket.socket) -> None:
        self.uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        self.channel = Channel(sock)
        self.watches: list[_Watch] = []


class Blind:
    """What is there where no program can be loaded: it says so to everybody who asks."""

    def __init__(self, listener: socket.socket, why: str) -> None:
        listener.setblocking(True)
        self._listener, self._why = listener, msgspec.json.encode({"why": why})
        self._peers: list[Channel] = []

    def serve(self) -> None:
        """Answer until the process is ended."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        notify("READY=1")
        self._listener.settimeout(_TICK_S)
        while True:
            with contextlib.suppress(OSError):
                sock, _ = self._listener.accept()
                self._peers.append(Channel(sock))
            self._peers = [peer for peer in self._peers if self._answered(peer)]
            notify("WATCHDOG=1")

    def _answered(self, peer: Channel) -> bool:
        """Answer what a peer asked; return whether it is still there."""
        try:
            frame = peer.receive()
            if frame is not None:
                for descriptor in frame.descriptors:
                    os.close(descriptor)
                peer.send("N" if frame.kind == "R" else "F", self._why)
        except FrameError:
            peer.close()
            return False
        return True


class Sensor:
    """The programs, the watches, and who asked for them."""

    def __init__(self, listener: socket.socket, programs: Programs, keepers: frozenset[int], wanted: Wanted) -> None:
        """Load what is always there.

        Raises:
            CloisterError: no program can be loaded at all.
        """
        self._listener, self._programs, self._keepers = listener, programs, keepers
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, _Watch] = {}
        self._slots = list(range(programs.settings.slots - 1, -1, -1))
        self._next = 1
        self._keeper: _Peer | None = None
        self._ended: list[tuple[Told, Sums]] = []
        """Watches that ended while there was no keeper."""
        self._missed = 0
        """What the keeper was told of programs that were left out."""
        self._gone: list[Told] = []
        """Watches of the sensor before that were over when this one began."""
        self._quiet_since = time.monotonic()
        self._leaving = False
        self._resting: tuple[str, ...] = ()
        """Programs that are loaded and not attached."""
        tree = kernel_watches.cgroup_tree()
        programs.load("process")
        if tree:
            with contextlib.closing(_Directory(tree)) as root:
                programs.load("network", cgroup=root.descriptor)
        if not programs.attached:
            refused = "; ".join(sorted({one.why_not for one in programs.outcomes}))
            raise StepError("kernel-events-refused", f"the kernel takes none of the programs: {refused}")
        if wanted != "off":
            files = self._files()
            programs.load("calls", shapes=shapes(platform.machine(), wanted, files_elsewhere=files))
            programs.load("rings")
        self._rest()
        self._configure()
        for one in sensor_store.kept():
            self._resume(one)

    @property
    def tiers(self) -> dict[str, str]:
        """What is seen while something is watched."""
        return kernel_tiers.tiers([*self._programs.attached, *self._resting])

    def serve(self) -> None:
        """Serve until told to end."""
        hear, say = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(say, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._leave)
        self._selector.register(hear, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        notify("READY=1")
        while not self._leaving:
            for key, _ in self._selector.select(_TICK_S):
                if isinstance(key.data, _Peer):
                    self._hear(key.data)
                elif key.fd == hear:
                    os.read(hear, 4096)
                else:
                    self._accept()
            self._tick()

    def _leave(self, *_: object) -> None:
        self._leaving = True

    # --- programs ---------------------------------------------------------------------------

    def _files(self) -> bool:
        """Attach the hooks of files: as LSM where BPF is one, else at the functions that call them."""
        lsm = "lsm_file_open" in _attached(self._programs.load("lsm")) and _bpf_is_lsm()
        if lsm:
            return True
        self._programs.pause([name for name in self._programs.attached if name.startswith("lsm_")])
        return "fentry_file_open" in _attached(self._programs.load("fentry"))

    def _rest(self) -> None:
        """Detach what every process of the host pays for; it stays loaded."""
        self._resting = tuple(name for name in self._programs.attached if name.startswith(("calls_", "rings_")))
        self._programs.pause(self._resting)

    def _rise(self) -> None:
        self._programs.resume(self._resting)
        self._resting = ()

    def _configure(self) -> None:
        groups = [one for one in self._watches.values() if one.descriptor >= 0]
        # A depth that nobody can know: look at all of them.
        unknown = any(not one.level for one in groups)
        levels = range(1, 17) if unknown else {one.level for one in groups}
        self._programs.configure(levels, len(self._watches) - len(groups))

    # --- peers ------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            peer = _Peer(sock)
            self._selector.register(sock, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        try:
            frame = peer.channel.receive()
            if frame is None:
                return
            try:
                self._answer(peer, frame)
            finally:
                for descriptor in frame.descriptors:
                    os.close(descriptor)
        except (FrameError, msgspec.MsgspecError, OSError):
            self._drop(peer)

    def _answer(self, peer: _Peer, frame: Frame) -> None:
        if frame.kind == "R" and peer.uid in self._keepers:
            self._hand_over(peer)
        elif frame.kind == "W":
            try:
                self._grant(peer, frame)
            except StepError as error:
                peer.channel.send("F", msgspec.json.encode({"why": str(error)}))
        else:
            raise FrameError("an unexpected frame")

    def _drop(self, peer: _Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.channel)
        peer.channel.close()
        if peer is self._keeper:
            self._keeper = None
        for watch in peer.watches:
            if watch.descriptor < 0:
                self._end(watch)

    def _hand_over(self, peer: _Peer) -> None:
        """Give the rings to the keeper; there is one reader, so the one before is let go."""
        if self._keeper is not None and self._keeper is not peer:
            self._drop(self._keeper)
        self._keeper = peer
        chosen, maps = self._programs.settings, self._programs.maps
        ended, self._ended = self._ended, []
        told = [*self._gone, *(one for one, _ in ended), *(one.told for one in self._watches.values())]
        words = Rings(chosen.critical_bytes, chosen.bulk_bytes, platform.machine(), self.tiers, told)
        peer.channel.send("R", msgspec.json.encode(words), [maps["critical"], maps["bulk"]])
        for _, sums in ended:
            self._tell("E", sums)
        self._gone = []
        for watch in self._watches.values():
            watch.lost = (0, 0)
            watch.told = msgspec.structs.replace(watch.told, resumed="")  # said once
        self._missed = 0

    def _tell(self, kind: str, value: Any) -> None:
        if self._keeper:
            try:
                self._keeper.channel.send(kind, msgspec.json.encode(value))
            except FrameError:
                self._drop(self._keeper)

    # --- watches ----------------------------------------------------------------------------

    def _grant(self, peer: _Peer, frame: Frame) -> None:
        """Watch what the descriptor names.

        Raises:
            StepError: it may not be, or cannot be.
        """
        fields = msgspec.json.decode(frame.payload, type=dict[str, str])
        if not fields.keys() <= _FIELDS or any(len(value.encode()) > _FIELD_BYTES for value in fields.values()):
            raise StepError("kernel-watch-refused", "these words are not those of a run")
        if len(frame.descriptors) != 1:
            raise StepError("kernel-watch-refused", "one descriptor must say what is watched")
        found = kernel_watches.of_descriptor(frame.descriptors[0])
        if peer.uid not in {0, found.owner}:
            raise StepError("kernel-watch-refused", "it belongs to somebody else")
        if any(one.key == found.key for one in self._watches.values()):
            raise StepError("kernel-watch-refused", "it is watched already")
        mine = sum(1 for one in self._watches.values() if one.uid == peer.uid)
        if not self._slots or (peer.uid != 0 and mine >= PER_UID):
            raise StepError("kernel-watch-refused", "too many runs are watched")
        watch = self._begin(peer, found, fields)
        if not found.key & kernel_watches.NAMESPACE_KEY:
            watch.descriptor = os.dup(frame.descriptors[0])
        asker = () if watch.descriptor >= 0 else (peer.channel.fileno(),)
        said = _Said(watch.told.watch, watch.uid, watch.told.fields)
        try:
            sensor_store.keep(watch.told.watch, msgspec.json.encode(said), (frame.descriptors[0], *asker))
        except OSError as error:  # it is watched all the same
            sys.stderr.write(f"<4>cloister: a restart would not find watch {watch.told.watch} again: {error}\n")
        self._enforce(watch)
        peer.channel.send("W", msgspec.json.encode({"watch": watch.told.watch, "tiers": self.tiers}))

    def _begin(self, peer: _Peer, found: kernel_watches.Watched, fields: dict[str, str]) -> _Watch:
        if peer.uid:  # a user speaks for nobody else
            fields = {key: fields[key] for key in ("run", "agent") if key in fields} | {"user": _name(peer.uid)}
        told = Told(self._next, self._slots.pop(), fields)
        self._next += 1
        watch = _Watch(told, found.key, found.level, peer.uid)
        self._watches[told.watch] = watch
        peer.watches.append(watch)
        return watch

    def _resume(self, kept: sensor_store.Kept) -> None:
        """Go on with a watch of the sensor before, where what it named is still there and who asked is as well."""
        try:
            said = msgspec.json.decode(kept.text, type=_Said)
        except msgspec.MsgspecError:  # it was killed while it kept it, before its answer
            return
        self._next = max(self._next, said.number + 1)
        found = _still(kept) if self._slots else None
        if found is None:
            self._gone.append(Told(said.number, 0, said.fields, "ended", time.time_ns()))
            sensor_store.forget(said.number)
            for descriptor in {kept.target, kept.connection} - {-1}:
                os.close(descriptor)
            return
        told = Told(said.number, self._slots.pop(), said.fields, "again", time.time_ns())
        watch = _Watch(told, found.key, found.level, said.uid)
        self._watches[said.number] = watch
        if found.key & kernel_watches.NAMESPACE_KEY:
            peer = _Peer(socket.socket(fileno=kept.connection))
            peer.watches.append(watch)
            self._selector.register(peer.channel, selectors.EVENT_READ, peer)
            os.close(kept.target)
        else:
            watch.descriptor = kept.target
        self._enforce(watch)

    def _enforce(self, watch: _Watch) -> None:
        self._quiet_since = 0.0
        if self._resting:
            self._rise()
        self._tell("W", watch.told)
        self._configure()
        self._programs.watch(watch.key, watch.told.watch, watch.told.slot)

    def _end(self, watch: _Watch) -> None:
        """Watch it no longer, and tell what was counted."""
        if self._watches.pop(watch.told.watch, None) is None:
            return
        self._programs.forget(watch.key)
        sensor_store.forget(watch.told.watch)
        sums = self._sums(watch, calls=True)
        self._programs.clear(watch.told.slot)
        self._slots.insert(0, watch.told.slot)
        if watch.descriptor >= 0:
            os.close(watch.descriptor)
            watch.descriptor = -1
        self._configure()
        if self._keeper:
            self._tell("E", sums)
        elif len(self._ended) < _ENDED:
            self._ended.append((watch.told, sums))

    def _sums(self, watch: _Watch, *, calls: bool) -> Sums:
        counters = Counters(self._programs.maps)
        tallies = [tuple(counters.tally(watch.told.slot, ring)) for ring in range(2)]
        return Sums(watch.told.watch, tallies, counters.calls(watch.told.slot) if calls else {})

    def _look(self, watch: _Watch) -> None:
        """Tell the keeper when something of a watch was lost."""
        sums = self._sums(watch, calls=False)
        lost = (sum(sums.tallies[0][1:]), sum(sums.tallies[1][1:]))
        if lost != watch.lost and self._keeper:
            watch.lost = lost
            self._tell("L", sums)

    def _look_at_programs(self) -> None:
        """Tell the keeper when the kernel left programs out: no record and no tally knows of what they did not see."""
        missed = self._programs.misses()
        if missed > self._missed and self._keeper:
            self._missed = missed
            self._tell("M", Missed(missed))

    def _tick(self) -> None:
        for watch in list(self._watches.values()):
            if watch.descriptor >= 0 and not kernel_watches.lives(watch.descriptor):
                self._end(watch)
            else:
                self._look(watch)
        self._look_at_programs()
        now = time.monotonic()
        if self._watches:
            self._quiet_since = 0.0
        elif not self._quiet_since:
            self._quiet_since = now
        elif now - self._quiet_since > LINGER_S and not self._resting:
            self._rest()
        notify("WATCHDOG=1")


def _still(kept: sensor_store.Kept) -> kernel_watches.Watched | None:
    """Return what is watched, where it is still there, and who asked is as well."""
    try:
        found = kernel_watches.of_descriptor(kept.target)
    except StepError:
        return None
    return None if found.key & kernel_watches.NAMESPACE_KEY and kept.connection < 0 else found


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _attached(outcomes: Iterable[Outcome]) -> set[str]:
    return {one.program for one in outcomes if not one.why_not}


def _bpf_is_lsm() -> bool:
    """Whether programs of this kind are called at all: they load and attach also where they are not."""
    try:
        with open("/sys/kernel/security/lsm", encoding="ascii") as file:
            return "bpf" in file.read().strip().split(",")
    except OSError:
        return False


class _Directory:
    """A directory held open."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.descriptor)


def main(argv: list[str] | None = None) -> int:
    """Serve; return the exit status."""
    parser = argparse.ArgumentParser(prog="cloister-sensor", description="Load the programs that see what agents do.")
    parser.add_argument("--socket", default="", help=f"listen here instead of on systemd's socket ({SENSOR_SOCKET})")
    parser.add_argument("--keeper", action="append", default=[], help="user that may read events")
    parser.add_argument("--calls", choices=("off", "security", "all"), default="security")
    options = parser.parse_args(argv)
    try:
        listener = listen(options.socket)
        keepers = frozenset({0, *(pwd.getpwnam(name).pw_uid for name in options.keeper)})
        try:
            with Programs() as programs:
                Sensor(listener, programs, keepers, options.calls).serve()
        except StepError as error:
            # Never a silent downgrade: who asks is told why nothing is seen, for as long as this lives.
            sys.stderr.write(f"<4>{render(error)}\n")
            Blind(listener, str(error)).serve()
    except (CloisterError, OSError) as error:
        shown = render(error) if isinstance(error, CloisterError) else f"cloister: the sensor: {error}"
        sys.stderr.write(f"{shown}\n")
        return error.exit_code if isinstance(error, CloisterError) else 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
