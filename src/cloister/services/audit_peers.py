"""Who reports to the system's keeper, what each may say, and how much.

Who somebody is is the kernel's word (SO_PEERCRED). root and the system's broker speak for others; a user speaks for
runs of their own, in the kinds that a broker reports, and is stamped with uid and name; agents' accounts are turned
away. Nobody's flood silences others: each uid has a rate, a share of it kept for what matters most, and a size per day.
What is beyond that is dropped, counted, and the count is an event. Frames are bounded, descriptors that come along
are closed by the kernel (nothing receives them).
"""

from __future__ import annotations

import contextlib
import pwd
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from hashlib import blake2b

import msgspec

from cloister.audit.chain import encode, event_of
from cloister.audit.event import Event
from cloister.audit.kinds import kinds
from cloister.host.audit_send import COUNT, HEADER
from cloister.plan.unit import FIRST_UID, PROXY_USER, UID_COUNT

MOST_FRAME = 1 << 18
MOST_EVENT = 1 << 16
"""Bytes of one event."""
PER_UID, IN_ALL = 16, 512
"""Connections."""
RATE, BURST = 2_000.0, 20_000.0
"""Events per second of one uid, and how many at once, of kinds that an agent can cause at will."""
RARE_RATE, RARE_BURST = 100.0, 5_000.0
"""The same of all other kinds, counted apart: a flood of connections hides no end of a run."""
DAY_BYTES = 512 << 20
"""Of one uid in a day."""
USERS_KINDS = frozenset({
    "run.started", "run.ended", "run.refused", "run.warned", "step.applied", "step.undone", "policy.changed",
    "egress.decided", "egress.request", "credential.used", "signing.used", "identity.issued", "model.called",
    "log.lost", "process.executed", "network.connected",
})  # fmt: skip
"""What a user's broker may report."""
_TOLD = frozenset({"process.executed", "network.connected"})
"""The sensor's kinds, where a sandbox's first process tells them: of that tier, whatever the reporter says."""
_OFTEN = _TOLD | {"egress.decided", "egress.request", "credential.used", "signing.used", "model.called"}
_ROOTS_KINDS = USERS_KINDS | {"hostd.request", "firewall.changed"}
_EVENTS, _WRITTEN, _STOP = ord("E"), ord("K"), ord("S")
MOST_REMEMBERED = 8192
"""Events of one uid that are told from repeated ones: more than its connections have under way, of ordinary size."""
_MOST_ID = 64
_AHEAD_NS = 5_000_000_000
_LOST_EVERY_S = 1.0
_decoder = msgspec.json.Decoder(Event)


class _Reported(msgspec.Struct):
    """Of a line of the log, what tells a repeated event."""

    id: str = ""
    reporter_uid: int | None = None


_reported = msgspec.json.Decoder(_Reported)


class Allowance:
    """What one uid may still report."""

    __slots__ = ("_at", "_day", "_left", "_often", "_rare")

    def __init__(self) -> None:
        """Begin with everything."""
        self._often, self._rare, self._at = BURST, RARE_BURST, time.monotonic()
        self._day, self._left = time.monotonic(), DAY_BYTES

    def take(self, kind: str, size: int) -> bool:
        """Say whether an event of this kind and size is within the allowance, and count it."""
        now = time.monotonic()
        passed, self._at = now - self._at, now
        self._often = min(BURST, self._often + passed * RATE)
        self._rare = min(RARE_BURST, self._rare + passed * RARE_RATE)
        if now - self._day > 86400.0:  # noqa: PLR2004  # a day
            self._day, self._left = now, DAY_BYTES
        if kind in _OFTEN:
            if self._often < 1 or self._left < size:
                return False
            self._often -= 1
        else:
            if self._rare < 1:
                return False
            self._rare -= 1
        self._left = max(0, self._left - size)
        return True


class Account:
    """A uid that reports: its name, its rights, its allowance, and what of it was dropped."""

    def __init__(self, uid: int) -> None:
        """Look the name up."""
        self.uid = uid
        try:
            self.name = pwd.getpwuid(uid).pw_name
        except KeyError:
            self.name = f"user{uid}"
        self.trusted = uid == 0 or self.name == PROXY_USER
        self.allowance = Allowance()
        self.connections = 0
        self.dropped = 0
        self.why = ""
        self.said_at = 0.0
        self._known: dict[bytes, None] = {}

    def remember(self, event: bytes) -> bool:
        """Remember an event as it is recorded; return whether it was new. Old ones are forgotten, one by one."""
        digest = blake2b(event, digest_size=16).digest()
        if digest in self._known:
            return False
        self._known[digest] = None
        if len(self._known) > MOST_REMEMBERED:
            del self._known[next(iter(self._known))]
        return True

    def drop(self, why: str) -> None:
        """Count an event that is not recorded."""
        self.dropped += 1
        self.why = why

    def judge(self, line: bytes) -> bytes | None:
        """Return the event as it is recorded, stamped; None when it is not.

        Times ahead of ours by more than 5 s are replaced: who could write into the future could hide there.
        """
        if len(line) > MOST_EVENT:
            self.drop("an event was too long")
            return None
        try:
            event = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.drop("an event was not understood")
            return None
        if event.kind not in (_ROOTS_KINDS if self.trusted else USERS_KINDS) or event.kind not in kinds():
            self.drop(f"{event.kind[:40]!r} is not for this reporter to say")
            return None
        if not self.trusted and not self.allowance.take(event.kind, len(line)):
            self.drop("more than its share")
            return None
        now = time.time_ns()
        when = now if event.time > now + _AHEAD_NS or event.time < 0 else event.time
        changes: dict[str, object] = {"time": when, "reporter_uid": self.uid}
        if not self.trusted:
            changes |= {"source": "broker", "user": self.name, "account": ""}
        elif self.uid != 0:
            changes |= {"source": "proxyd"}
        if event.kind in _TOLD:  # also root's: the sensor's own come by its rings
            changes["tier"] = "seccomp"
        if len(event.id) > _MOST_ID:
            changes["id"] = ""
        recorded = encode(msgspec.structs.replace(event, **changes))
        # A source that saw no confirmation sends again what may be in the log, or in the batch that waits for room.
        return None if event.id and not self.remember(recorded) else recorded


class Peer:
    """One connection."""

    __slots__ = ("_buffer", "_frames", "account", "sock")

    def __init__(self, sock: socket.socket, account: Account) -> None:
        """Take a connection."""
        self.sock, self.account = sock, account
        self._buffer = bytearray()
        self._frames = 0

    def receive(self) -> list[bytes] | None:
        """Return the events of whole frames that have come; None where none has.

        Raises:
            OSError: the peer left, or does not keep to the protocol.
        """
        try:
            data = self.sock.recv(1 << 17)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError
        self._buffer += data
        events: list[bytes] = []
        whole = False
        while (frame := self._frame()) is not None:
            whole = True
            self._frames += 1
            events += [event for line in frame.split(b"\n") if line and (event := self.account.judge(line)) is not None]
        return events if whole else None

    def _frame(self) -> bytes | None:
        if len(self._buffer) < HEADER.size:
            return None
        length, kind = HEADER.unpack_from(self._buffer)
        if kind != _EVENTS or length > MOST_FRAME:
            raise ConnectionAbortedError("not the protocol")
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return frame

    def confirm(self) -> None:
        """Tell the peer how many of its frames are written.

        Raises:
            OSError: it left, or does not read.
        """
        self.sock.send(HEADER.pack(COUNT.size, _WRITTEN) + COUNT.pack(self._frames), socket.MSG_NOSIGNAL)

    def order(self, payload: bytes) -> None:
        """Tell the peer to stop a run.

        Raises:
            OSError: it left, or does not read.
        """
        self.sock.send(HEADER.pack(len(payload), _STOP) + payload, socket.MSG_NOSIGNAL)


class Peers:
    """All connections and uids."""

    def __init__(self) -> None:
        """Know nobody."""
        self._accounts: dict[int, Account] = {}
        self._count = 0
        self._events_dropped = 0

    def admit(self, sock: socket.socket) -> Peer | None:
        """Take a connection, or turn it away."""
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        agent = FIRST_UID <= uid < FIRST_UID + UID_COUNT
        account = self._accounts.get(uid)
        if account is None and not agent:
            self._forget_quiet()
            account = self._accounts[uid] = Account(uid)
        most = IN_ALL if account and account.trusted else PER_UID
        if account is None or account.connections >= most or (self._count >= IN_ALL and not account.trusted):
            sock.close()
            return None
        sock.setblocking(False)
        account.connections += 1
        self._count += 1
        return Peer(sock, account)

    def recall(self, lines: Iterable[bytes]) -> None:
        """Remember events from the end of the log: sources send again what the keeper before did not confirm."""
        for line in lines:
            try:
                who = _reported.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if who.id and who.reporter_uid is not None:
                account = self._accounts.get(who.reporter_uid)
                if account is None:
                    account = self._accounts[who.reporter_uid] = Account(who.reporter_uid)
                account.remember(event_of(line))

    def leave(self, peer: Peer) -> None:
        """Close a connection."""
        with contextlib.suppress(OSError):
            peer.sock.close()
        peer.account.connections -= 1
        self._count -= 1

    def lost(self) -> list[Event]:
        """Return what has to be said of dropped events: one event a second and uid."""
        now, said = time.monotonic(), []
        for account in self._accounts.values():
            if account.dropped and now - account.said_at >= _LOST_EVERY_S:
                fields = {"user": account.name, "reporter_uid": account.uid, "message": account.why}
                event = Event(time=time.time_ns(), kind="log.lost", severity_id=4, source="auditd")
                said.append(msgspec.structs.replace(event, count=account.dropped, **fields))
                self._events_dropped += account.dropped
                account.dropped, account.said_at = 0, now
        return said

    def told(self) -> Mapping[str, str | int | float | bool]:
        """Return what heads say of it."""
        return {"reporters": self._count, "dropped": self._events_dropped}

    def _forget_quiet(self) -> None:
        """Make room: whoever has no connection and nothing to tell comes back with a full allowance."""
        if len(self._accounts) > 4096:  # noqa: PLR2004  # more people than one host has
            quiet = [uid for uid, one in self._accounts.items() if not one.connections and not one.dropped]
            for uid in quiet:
                del self._accounts[uid]
