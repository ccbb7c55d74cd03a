"""What root's part asks of the system's manager about units, over its private D-Bus socket: start, state, end.

`systemctl` and `systemd-run` say the same, but are programs: with each start some of them cost as much as all the rest
together, and while a unit starts they take the processor from the manager. Here a unit's start is waited for
by the manager's own signal. What a unit is made of is not said here (`unit_start`, `unit_dbus`).

Sources: D-Bus Specification (marshaling), org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import signal
import struct

from cloister.host import unit_dbus
from cloister.host.systemd_manager import (
    ANSWER,
    ERROR,
    MEMBER,
    NO_SUCH_UNIT,
    REPLY_SERIAL,
    SIGNAL,
    Manager,
    ManagerError,
    Message,
    Writer,
    error_of,
    read_string,
)

_PROPERTIES = "org.freedesktop.DBus.Properties"
_UNKNOWN = "org.freedesktop.DBus.Error.UnknownProperty"
_OF_EVERY_UNIT = frozenset({"LoadState", "ActiveState", "InvocationID", "Job", "CollectMode"})
_NUMBERS = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q"}
_INFINITY = (1 << 64) - 1
_CAPABILITIES = frozenset({"CapabilityBoundingSet", "AmbientCapabilities"})


class UnitManager(Manager):
    """A connection to the system's manager, as root. Use it in a `with` block; after an error it is closed."""

    passes_descriptors = True

    def __init__(self, path: str = "", timeout_s: float = 30.0) -> None:
        """Connect; the jobs that end from here on are heard.

        Raises:
            ManagerError: the manager is not there, or does not want us.
        """
        self._ended: dict[str, str] = {}
        self._asked = 0
        super().__init__(path, timeout_s)

    def show(self, unit: str, names: tuple[str, ...]) -> dict[str, str]:
        """Return properties of a unit, in the words of `systemctl show`; times are numbers in µs.

        Names that this manager does not know are left out.

        Raises:
            ManagerError: no answer, or one that is not understood.
        """
        path = f"/org/freedesktop/systemd1/unit/{_label(unit)}"
        shown: dict[str, str] = {}
        with self.in_words():
            waiting: dict[int, str] = {}
            calls = bytearray()
            for name in names:
                body = Writer()
                body.string(f"org.freedesktop.systemd1.{'Unit' if name in _OF_EVERY_UNIT else 'Service'}")
                body.string(name)
                calls += self.marshal("Get", "ss", body.data, (path, _PROPERTIES))
                waiting[self.serial] = name
            self.send(calls)
            while waiting:
                message = self.next()
                if message.kind not in (ANSWER, ERROR):
                    continue
                name = waiting.pop(int(message.fields.get(REPLY_SERIAL, 0)), "")
                if message.kind == ERROR and (error := error_of(message)).name != _UNKNOWN:
                    raise error
                if message.kind == ANSWER and name:
                    shown[name] = _in_words(name, message.body)
        return shown

    def ask_start(self, body: bytearray, streams: tuple[int, int, int]) -> None:
        """Ask for a transient unit (`unit_dbus.start_call`) with `streams` as its standard ones; wait for nothing.

        Raises:
            ManagerError: the manager cannot be reached.
        """
        with self.in_words():
            call = self.marshal("StartTransientUnit", unit_dbus.START, body, descriptors=len(streams))
            self._asked = self.serial
            self.send(call, streams)

    def await_answer(self) -> str:
        """Wait for the answer to `ask_start`; return the job of the start.

        Raises:
            ManagerError: the unit is refused, with the name of the D-Bus error; or no answer in time.
        """
        with self.in_words():
            while True:
                message = self.next()
                if message.kind in (ANSWER, ERROR) and message.fields.get(REPLY_SERIAL) == self._asked:
                    break
            if message.kind == ERROR:
                raise error_of(message)
            return read_string(message.body, 0)[0]

    def await_end(self, job: str) -> str:
        """Wait for the end of a job, also one that ended since we connected; return how (`done`, `failed` and others).

        Raises:
            ManagerError: it did not in time.
        """
        with self.in_words():
            while job not in self._ended:
                self.next()
            return self._ended[job]

    def end(self, unit: str, *, kill: bool) -> None:
        """Stop a unit, on request with SIGKILL for all of it, and wait for that; one that is not there is fine.

        Raises:
            ManagerError: the manager refuses for another reason, or the unit does not end in time.
        """
        try:
            with self.in_words():
                if kill:
                    body = Writer()
                    body.string(unit)
                    body.string("all")
                    body.number("i", signal.SIGKILL)
                    self.call("KillUnit", "ssi", body.data)
                body = Writer()
                body.string(unit)
                body.string("replace")
                # A start that was under way has a job that ends before.
                self.await_end(read_string(self.call("StopUnit", "ss", body.data).body, 0)[0])
        except ManagerError as error:
            if error.name != NO_SUCH_UNIT:
                raise

    def forget(self, unit: str) -> None:
        """Let the manager drop a unit that has failed; one that is not there is fine."""
        body = Writer()
        body.string(unit)
        try:
            with self.in_words():
                self.call("ResetFailedUnit", "s", body.data)
        except ManagerError as error:
            if error.name != NO_SUCH_UNIT:
                raise

    def next(self) -> Message:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Return the next message, and keep in mind which jobs have ended."""
        message = super().next()
        if message.kind == SIGNAL and message.fields.get(MEMBER) == "JobRemoved":
            job, offset = read_string(message.body, 4)  # behind its number
            _, offset = read_string(message.body, offset)
            self._ended[job] = read_string(message.body, offset)[0]
        return message


def _label(unit: str) -> str:
    """Return a unit's name as a part of an object path (sd_bus_path_encode(3))."""
    plain = (ord(char) for char in unit)
    return "".join(
        chr(code) if chr(code).isascii() and chr(code).isalnum() and not (at == 0 and chr(code).isdigit())
        else f"_{code:02x}"
        for at, code in enumerate(plain)
    )  # fmt: skip


def _in_words(name: str, body: bytes) -> str:
    """Return a variant in the words of `systemctl show`; a type that is not known is told as it is."""
    kind = body[1 : 1 + body[0]].decode("ascii")
    offset = body[0] + 2
    if kind in {"s", "o"}:
        return read_string(body, offset)[0]
    if kind == "b":
        return "yes" if _number(body, offset, "I") else "no"
    if kind in _NUMBERS:
        number = _number(body, offset, _NUMBERS[kind])
        if name == "RestrictNamespaces":  # a set of those that are allowed
            return "no" if number & _NAMESPACES == _NAMESPACES else "yes" if number == 0 else f"{number:#x}"
        if name in _CAPABILITIES:
            return f"{number:#x}" if number else ""
        return "infinity" if kind == "t" and number == _INFINITY else str(number)
    if kind == "ay":
        start = offset + -offset % 4 + 4
        return body[start : start + _number(body, offset, "I")].hex()
    if kind == "as":
        return " ".join(_strings(body, offset))
    if kind == "(uo)":
        return str(_number(body, offset + -offset % 8, "I"))
    raise IndexError(f"{name} has the type {kind!r}")


_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, -TIME, -CGROUP, -UTS, -IPC, -USER, -PID, -NET."""


def _number(body: bytes, offset: int, code: str) -> int:
    offset += -offset % struct.calcsize(code)
    return int(struct.unpack_from(f"<{code}", body, offset)[0])


def _strings(body: bytes, offset: int) -> list[str]:
    end = offset + -offset % 4 + 4 + _number(body, offset, "I")
    offset += -offset % 4 + 4
    found = []
    while offset < end:
        text, offset = read_string(body, offset)
        found.append(text)
    return found
