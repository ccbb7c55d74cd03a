"""The keeper's end of the sensor: its rings become lines of the log, its watches get names, its losses are told.

`Source.turn` is called in every turn of the keeper's loop, and never waits. Where there is no sensor it says so in
the log, once (`log.tier`), and looks for one again. Lines of kernel events are built and chained in C; this only moves
batches.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping

import msgspec

from cloister.audit.calls import COMPAT, UNKNOWN, described, numbers
from cloister.audit.chain import Position, encode
from cloister.audit.event import Event
from cloister.errors import CloisterError
from cloister.host.frames import Channel, Frame, FrameError
from cloister.host.kernel_events import Call, Reader, boot_id
from cloister.host.sensor_ask import SENSOR_SOCKET, Missed, Rings, Sums, Told
from cloister.runs import kernel_tiers
from cloister.runs.audit_keeper import Detail, Keeper

AGAIN_S = 5.0
BATCHES = 16
"""So many at most in one turn: others wait."""
_RINGS = ("critical", "bulk")
_DETECTED = ("executed", "forked", "connected", "called", "file", "privilege", "traced", "kernel", "ring")
"""Events that detections are about; ends of processes, datagrams and binds are not."""


class _Known:
    """A watch, and what was told of it."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.lost = [(0, 0), (0, 0)]
        self.over: Sums | None = None


class Source:
    """Kernel events for a keeper."""

    def __init__(
        self, keeper: Keeper, path: str = SENSOR_SOCKET, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connect to nothing yet."""
        self._keeper, self._path, self._clock = keeper, path, clock
        self._channel: Channel | None = None
        self._reader: Reader | None = None
        self._maps: dict[str, int] = {}
        self._known: dict[int, _Known] = {}
        self._names: dict[int, str] = {}
        self._tiers: dict[str, str] = {}
        self._missed = 0
        self._said: tuple[str, ...] | None = None
        self._next_try = 0.0
        self._gone_ns = 0
        """When the sensor was lost."""
        self._gaps: list[Told] = []
        """Runs that were unseen while the sensor restarted, which the log does not say yet."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to wait for: the sensor's socket and the rings; nothing while there is no sensor."""
        rings = [self._maps[name] for name in _RINGS if name in self._maps]
        return (self._channel.fileno(), *rings) if self._channel else ()

    def heads(self) -> dict[str, Detail]:
        """What a head of the log says of kernel events."""
        words: dict[str, Detail] = {f"tier_{area}": tier for area, tier in self._tiers.items()}
        if self._reader:
            counts = self._reader.counts()
            words |= {"kernel_delivered": sum(counts.delivered), "kernel_missing": sum(counts.missing)}
            words["kernel_left_out"] = self._missed
        return words or {"tier_process": "none"}

    def turn(self) -> bool:
        """Take what waits; return whether there may be more at once.

        Raises:
            OSError: the log could not be written; nothing is lost.
        """
        if self._channel is None and self._clock() >= self._next_try:
            self._next_try = self._clock() + AGAIN_S
            self._connect()
        if self._channel is None:
            return False
        try:
            self._listen()
        except (FrameError, msgspec.MsgspecError, CloisterError) as error:
            self._lose(str(error))
            return False
        self._tell_gaps()
        more = self._drain()
        if not more:
            self._end_watches()
        return more

    def close(self) -> None:
        """Let go of the rings; what is in them waits for the next keeper."""
        if self._reader:
            self._reader.close()
        for descriptor in self._maps.values():
            os.close(descriptor)
        if self._channel:
            self._channel.close()
        self._channel = self._reader = None
        self._maps, self._known, self._tiers, self._missed = {}, {}, {}, 0

    # --- the sensor -------------------------------------------------------------------------

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._path)
            self._channel = Channel(sock)
            self._channel.send("R")
        except OSError as error:
            sock.close()
            self._channel = None
            self._tell_tiers({}, f"there is no sensor: {error.strerror}")

    def _lose(self, why: str) -> None:
        with contextlib.suppress(OSError):
            self._drain()
        self.close()
        self._gone_ns = time.time_ns()
        self._next_try = self._clock() + AGAIN_S
        self._tell_tiers({}, f"the sensor is gone: {why}")

    def _listen(self) -> None:
        """Read what the sensor says.

        Raises:
            FrameError: it is gone.
        """
        while self._channel and (frame := self._channel.receive()):
            kept = frame.kind == "R"
            try:
                self._hear(frame)
            finally:
                if not kept:
                    for descriptor in frame.descriptors:
                        os.close(descriptor)

    def _hear(self, frame: Frame) -> None:
        if frame.kind == "R":
            self._open(msgspec.json.decode(frame.payload, type=Rings), frame.descriptors)
        elif frame.kind == "W":
            self._name(msgspec.json.decode(frame.payload, type=Told))
        elif frame.kind == "N":
            self._tell_tiers({}, msgspec.json.decode(frame.payload, type=dict[str, str])["why"])
        elif frame.kind == "M":
            self._tell_missed(msgspec.json.decode(frame.payload, type=Missed).total)
        elif frame.kind in {"L", "E"}:
            sums = msgspec.json.decode(frame.payload, type=Sums)
            known = self._known.get(sums.watch)
            if known:
                self._tell_loss(known, sums)
                known.over = sums if frame.kind == "E" else None

    def _open(self, rings: Rings, descriptors: tuple[int, ...]) -> None:
        self._maps = dict(zip(_RINGS, descriptors, strict=True))
        sizes = (rings.critical_bytes, rings.bulk_bytes)
        self._reader = Reader(self._maps["critical"], self._maps["bulk"], sizes, boot_id())
        self._reader.tee(_DETECTED)
        self._reader.describe([Call(*one) for one in described(rings.machine)])
        self._names = {number: name for name, number in numbers(rings.machine).items()}
        self._names |= {COMPAT: "compat", UNKNOWN: "unknown"}
        self._gaps += [told for told in rings.watches if told.resumed]
        for told in rings.watches:
            if told.resumed != "ended":
                self._name(told)
        self._tell_tiers(rings.tiers, "")

    def _name(self, told: Told) -> None:
        assert self._reader  # noqa: S101  # `R` comes first
        self._known[told.watch] = _Known(told)
        self._reader.name(told.watch, told.fields)

    # --- events -----------------------------------------------------------------------------

    def _drain(self) -> bool:
        """Move batches into the log; return whether more waits."""
        reader = self._reader
        if reader is None:
            return False
        for _ in range(BATCHES):
            found = _Found()

            def make(at: Position, found: _Found = found) -> tuple[memoryview, Position]:
                batch = reader.take(at.seq, at.hash, strangers=found.strangers)
                found.stranger = batch.stranger
                return batch.lines, Position(batch.seq, batch.hash)

            written = self._keeper.put_lines(make)
            if not written and found.stranger:
                with contextlib.suppress(FrameError):
                    self._listen()  # its name was sent before its first event
                found.strangers = found.stranger not in self._known
                written = self._keeper.put_lines(make)
            reader.commit()
            if not written:
                return False
            self._keeper.seen(reader.teed())
        return True

    def _end_watches(self) -> None:
        """Let go of watches that are over, now that their last event was taken."""
        for number, known in list(self._known.items()):
            if known.over and self._reader:
                self._tell_counts(known, known.over)
                del self._known[number]
                self._reader.forget(number)

    def _tell_loss(self, known: _Known, sums: Sums) -> None:
        """A loss is an event: how many, of which ring, and why."""
        for ring, name in enumerate(_RINGS):
            made, dropped, limited = sums.tallies[ring]
            before = known.lost[ring]
            if (dropped, limited) != before:
                known.lost[ring] = (dropped, limited)
                new = (dropped - before[0], limited - before[1])
                words: dict[str, Detail] = {"ring": name, "dropped": new[0], "limited": new[1], "made": made}
                why = "kernel-rate" if new[1] else "kernel-ring-full"
                self._put("log.lost", known, f"{sum(new)} kernel events were not recorded", words, 4, why)

    def _tell_missed(self, total: int) -> None:
        """A program that did not run is a loss too, though nobody can say of which run, or of how many events."""
        words: dict[str, Detail] = {"left_out": total - self._missed, "total": total}
        self._missed = total
        message = f"the kernel left programs out {words['left_out']} times; what they would have told is not recorded"
        self._put("log.lost", None, message, words, 4, "kernel-program-left-out")

    def _tell_gaps(self) -> None:
        """Nothing was seen of these runs while the sensor was away, and their counts begin anew."""
        while self._gaps:
            told = self._gaps[0]
            words: dict[str, Detail] = {"watched": told.resumed}
            if self._gone_ns:
                words |= {"since": self._gone_ns, "unseen_ms": max(0, told.at - self._gone_ns) // 1_000_000}
            message = "the sensor was restarted: this run was unseen meanwhile, and earlier counts of calls are gone"
            self._put("log.lost", _Known(told), message, words, 4, "sensor-restarted")
            self._gaps.pop(0)

    def _tell_counts(self, known: _Known, sums: Sums) -> None:
        made = {name: sums.tallies[ring][0] for ring, name in enumerate(_RINGS)}
        words: dict[str, Detail] = {"total": sum(sums.calls.values())}
        words |= {f"events_{name}": count for name, count in made.items()}
        for number, count in sorted(sums.calls.items(), key=lambda one: (-one[1], one[0])):
            words[f"call_{self._names.get(number, str(number))}"] = count
        self._put("kernel.counted", known, f"{sum(sums.calls.values())} system calls", words)

    def _tell_tiers(self, tiers: Mapping[str, str], why: str) -> None:
        self._tiers = dict(tiers)
        said = (*sorted(f"{area}={tier}" for area, tier in tiers.items()), why)
        if said == self._said:
            return
        self._said = said
        words: dict[str, Detail] = {f"tier_{area}": tier for area, tier in tiers.items()}
        if why:
            words["why"] = why
        unseen = "; ".join(kernel_tiers.blind(tiers))
        self._put("log.tier", None, f"not seen: {unseen}" if unseen else "everything is seen", words, 3 if why else 1)

    def _put(  # noqa: PLR0913  # the parts of an event
        self, kind: str, known: _Known | None, message: str, details: Mapping[str, Detail],
        severity: int = 1, reason: str = "",
    ) -> None:  # fmt: skip
        fields = known.told.fields if known else {}
        event = Event(
            time=time.time_ns(), kind=kind, message=message, details=dict(details), reason=reason, source="sensor",
            severity_id=severity,  # type: ignore[arg-type]  # 1 to 5
            run=fields.get("run", ""), agent=fields.get("agent", ""), user=fields.get("user", ""),
            account=fields.get("account", ""),
        )  # fmt: skip
        self._keeper.put([encode(event)])


class _Found:
    """What one batch met."""

    def __init__(self) -> None:
        self.stranger = 0
        self.strangers = False
