"""The BPF programs of the audit: loaded, attached one by one, and the maps that they share. Only the sensor does this.

One object file per group; where a kernel refuses one program of it, the others are loaded alone, so none is lost for
another's sake. Which ones are attached, and why not the others, is `outcomes`. What the programs see stands in
`audit/bpf`; what of it makes a tier in `runs/kernel_tiers.py`. Nothing here reads an event (`kernel_events`).

Needs CAP_BPF and CAP_PERFMON, CAP_NET_ADMIN for the programs of cgroups (capabilities(7)).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.resources
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from cloister.errors import StepError

CRITICAL_BYTES = 4 << 20
BULK_BYTES = 16 << 20
SLOTS = 128
CALLS = 512
RINGS = 2
BURST_NS = 1_000_000_000
RATES = (4 << 20, 16 << 20)
"""Bytes per second that one watch may fill, of the critical and the bulk ring; a second's worth at once."""
WAKE_BYTES = 1 << 20
NAMESPACE_KEY = 1 << 63
_LEVELS = 16
_CONTROL = struct.Struct(f"<QQQQ{_LEVELS}sII")
_WATCH = struct.Struct("<II")
_TALLY = struct.Struct("<QQQ")
_SHAPES = struct.Struct(f"<{CALLS}H")
SHARED = ("watched", "control", "tallies", "buckets", "sequences", "drafts", "critical", "bulk", "counts", "pending")


class Outcome(NamedTuple):
    """What came of one program."""

    group: str
    program: str
    why_not: str = ""
    """Empty: it is attached."""


class Tally(NamedTuple):
    """What became of the records of one watch in one ring: made = delivered + dropped + limited."""

    made: int
    dropped: int
    limited: int


class Settings(NamedTuple):
    """What may be chosen; the defaults are the product's."""

    critical_bytes: int = CRITICAL_BYTES
    bulk_bytes: int = BULK_BYTES
    slots: int = SLOTS
    rates: tuple[int, int] = RATES
    burst_ns: int = BURST_NS
    wake_bytes: int = WAKE_BYTES


def _native() -> tuple[Any, Any]:
    """Return the extension's `ffi` and `lib`, where it was built."""
    module = importlib.import_module("cloister.host._bpf")
    return module.ffi, module.lib


def missing() -> str:
    """Return why programs cannot be loaded at all, or nothing."""
    try:
        _native()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cloister.host._bpf":
            return "this installation was built without kernel events"
        return f"the loader of BPF programs does not load: {error}"
    if not os.path.exists("/sys/kernel/btf/vmlinux"):
        return "this kernel does not describe its types (/sys/kernel/btf/vmlinux)"
    return ""


class Programs:
    """Programs of the kernel, and their maps, for as long as this lives."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Load nothing yet.

        Raises:
            StepError: there is no loader.
        """
        why = missing()
        if why:
            raise StepError("kernel-events-unavailable", why, remedy="cloister doctor")
        self._ffi, self._lib = _native()
        self.settings = settings or Settings()
        self.outcomes: list[Outcome] = []
        self.maps: dict[str, int] = {}
        """Descriptors of the maps, by name."""
        self._objects: list[Any] = []
        self._links: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def attached(self) -> list[str]:
        """Names of programs that are attached."""
        return list(self._links)

    def load(
        self, group: str, *, cgroup: int = -1, only: Iterable[str] = (), shapes: Sequence[int] = ()
    ) -> list[Outcome]:
        """Load and attach a group; `cgroup` is where programs of cgroups go, `only` those of the group that are wanted.

        `shapes` says what is recorded of each system call. Refusals are not errors, they are what is returned.

        Raises:
            StepError: there is no such group in this installation.
        """
        image = _image(group)
        names = [name for name in self._names(image) if not only or name in set(only)]
        outcomes: list[Outcome] = []
        whole = self._open(image, names, shapes)
        if isinstance(whole, str):
            for name in names:
                single = self._open(image, [name], shapes)
                if isinstance(single, str):
                    outcomes.append(Outcome(group, name, single))
                else:
                    outcomes += self._attach(group, single, [name], cgroup)
        else:
            outcomes += self._attach(group, whole, names, cgroup)
        self.outcomes += outcomes
        return outcomes

    def pause(self, names: Iterable[str]) -> None:
        """Detach programs that stay loaded: `resume` is quick then, where loading takes the verifier a second."""
        for name in names:
            link = self._links.pop(name, None)
            if link is not None:
                self._lib.bpf_link__destroy(link)

    def resume(self, names: Iterable[str]) -> None:
        """Attach loaded programs again.

        Raises:
            StepError: the kernel refuses now.
        """
        wanted = set(names) - self._links.keys()
        for program in (one for _, programs in self._objects for one in programs):
            name = self._text(self._lib.bpf_program__name(program))
            if name not in wanted:
                continue
            link = self._lib.bpf_program__attach(program)
            if link == self._ffi.NULL:
                why = _reason(self._ffi.errno, self._said())
                raise StepError("kernel-events-refused", f"{name} cannot be attached again: {why}")
            self._links[name] = link

    def configure(self, levels: Iterable[int], namespaces: int) -> None:
        """Say at which depths watched cgroups are, at most sixteen, and how many pid namespaces are watched.

        Raises:
            StepError: there are more.
        """
        found = bytes(sorted(set(levels)))
        if len(found) > _LEVELS:
            raise StepError("kernel-watch-refused", "watched cgroups are at more than sixteen different depths")
        chosen = self.settings
        rates = [0 if rate <= 0 else max(1, 1_000_000_000 // rate) for rate in chosen.rates]
        words = (*rates, chosen.burst_ns, chosen.wake_bytes, found, namespaces, chosen.slots)
        self._update("control", b"\0" * 4, _CONTROL.pack(*words))

    def watch(self, key: int, number: int, slot: int) -> None:
        """Watch what is below a cgroup (its id) or in a pid namespace (`NAMESPACE_KEY` and its inode).

        Raises:
            StepError: the kernel refuses.
        """
        for ring in range(RINGS):
            self._update("buckets", struct.pack("<I", slot * RINGS + ring), b"\0" * 8)
        self._update("watched", struct.pack("<Q", key), _WATCH.pack(number, slot))

    def forget(self, key: int) -> None:
        """Watch it no longer; nothing happens where it was not."""
        with contextlib.suppress(StepError):
            self._call(self._lib.bpf_map_delete_elem(self.maps["watched"], struct.pack("<Q", key)))

    def clear(self, slot: int) -> None:
        """Set the counters of a slot to nothing, before another watch has it."""
        for ring in range(RINGS):
            self._update("tallies", struct.pack("<I", slot * RINGS + ring), bytes(_TALLY.size * self.cpus))
        if "counts" in self.maps:
            for number in range(CALLS):
                self._update("counts", struct.pack("<I", slot * CALLS + number), bytes(8 * self.cpus))

    def misses(self) -> int:
        """Return how often the kernel left a program out because it ran already on that CPU."""
        found = 0
        for _, programs in self._objects:
            found += sum(max(0, self._lib.loader_misses(self._lib.bpf_program__fd(one))) for one in programs)
        return found

    @property
    def cpus(self) -> int:
        """How many values a map per CPU has."""
        return int(self._lib.libbpf_num_possible_cpus())

    def close(self) -> None:
        """Detach everything and let go of the maps. May be called twice."""
        for link in self._links.values():
            self._lib.bpf_link__destroy(link)
        self._links = {}
        for opened, _ in self._objects:
            self._lib.bpf_object__close(opened)
        self._objects = []
        for descriptor in self.maps.values():
            os.close(descriptor)
        self.maps = {}

    # --- objects ----------------------------------------------------------------------------

    def _names(self, image: bytes) -> list[str]:
        opened = self._lib.loader_open(image, len(image))
        if opened == self._ffi.NULL:
            raise StepError("kernel-events-unavailable", f"a BPF object cannot be read: {self._said()}")
        try:
            return [self._text(self._lib.bpf_program__name(one)) for one in self._programs(opened)]
        finally:
            self._lib.bpf_object__close(opened)

    def _programs(self, opened: Any) -> list[Any]:
        return list(self._walk(self._lib.bpf_object__next_program, opened))

    def _walk(self, following: Any, opened: Any) -> Iterable[Any]:
        one = following(opened, self._ffi.NULL)
        while one != self._ffi.NULL:
            yield one
            one = following(opened, one)

    def _open(self, image: bytes, names: Sequence[str], shapes: Sequence[int]) -> Any | str:
        """Return a loaded object with these programs, or why there is none."""
        opened = self._lib.loader_open(image, len(image))
        for program in self._programs(opened):
            self._lib.bpf_program__set_autoload(program, self._text(self._lib.bpf_program__name(program)) in names)
        for one in self._walk(self._lib.bpf_object__next_map, opened):
            self._prepare(one, shapes)
        failed = self._lib.bpf_object__load(opened)
        if failed:
            said = self._said()
            self._lib.bpf_object__close(opened)
            return _reason(-failed, said)
        for one in self._walk(self._lib.bpf_object__next_map, opened):
            name = self._text(self._lib.bpf_map__name(one))
            if name in SHARED and name not in self.maps:
                self.maps[name] = os.dup(self._lib.bpf_map__fd(one))
        chosen = [one for one in self._programs(opened) if self._text(self._lib.bpf_program__name(one)) in names]
        self._objects.append((opened, chosen))
        return opened

    def _prepare(self, one: Any, shapes: Sequence[int]) -> None:
        name = self._text(self._lib.bpf_map__name(one))
        sizes = {
            "critical": self.settings.critical_bytes, "bulk": self.settings.bulk_bytes,
            "tallies": self.settings.slots * RINGS, "buckets": self.settings.slots * RINGS,
            "counts": self.settings.slots * CALLS,
        }  # fmt: skip
        if name in self.maps:
            self._lib.bpf_map__reuse_fd(one, self.maps[name])
        elif name in sizes:
            self._lib.bpf_map__set_max_entries(one, sizes[name])
        elif shapes and name.endswith(".rodata"):
            self._call(self._lib.bpf_map__set_initial_value(one, _SHAPES.pack(*shapes), _SHAPES.size))

    def _attach(self, group: str, opened: Any, names: Sequence[str], cgroup: int) -> list[Outcome]:
        outcomes = []
        for program in self._programs(opened):
            name = self._text(self._lib.bpf_program__name(program))
            if name not in names:
                continue
            if group == "network":
                link = self._lib.bpf_program__attach_cgroup(program, cgroup)
            else:
                link = self._lib.bpf_program__attach(program)
            if link == self._ffi.NULL:
                outcomes.append(Outcome(group, name, _reason(self._ffi.errno, self._said())))
            else:
                self._links[name] = link
                outcomes.append(Outcome(group, name))
        return outcomes

    # --- maps -------------------------------------------------------------------------------

    def _update(self, name: str, key: bytes, value: bytes) -> None:
        self._call(self._lib.bpf_map_update_elem(self.maps[name], key, value, 0))

    def _call(self, result: int) -> None:
        if result < 0:
            code = self._ffi.errno
            raise StepError("kernel-map-refused", f"a BPF map cannot be changed: {os.strerror(code)}")

    def _said(self) -> str:
        return self._text(self._lib.loader_said())

    def _text(self, pointer: Any) -> str:
        return str(self._ffi.string(pointer).decode("utf-8", "replace"))


class Counters:
    """The counters that the programs keep, for whoever holds the descriptors of the maps. Needs no privilege."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._ffi, self._lib = _native()
        self._maps = maps
        self._cpus = int(self._lib.libbpf_num_possible_cpus())

    def tally(self, slot: int, ring: int) -> Tally:
        """Return what became of a watch's records."""
        values = struct.unpack(f"<{3 * self._cpus}Q", self._read("tallies", slot * RINGS + ring, _TALLY.size))
        return Tally(sum(values[0::3]), sum(values[1::3]), sum(values[2::3]))

    def calls(self, slot: int) -> dict[int, int]:
        """Return how often each system call was made, by number; empty where none is counted."""
        if "counts" not in self._maps:
            return {}
        found = {number: self.count(slot, number) for number in range(CALLS)}
        return {number: count for number, count in found.items() if count}

    def count(self, slot: int, number: int) -> int:
        """Return how often one system call was made."""
        return sum(struct.unpack(f"<{self._cpus}Q", self._read("counts", slot * CALLS + number, 8)))

    def _read(self, name: str, key: int, size: int) -> bytes:
        value = self._ffi.new("char[]", size * self._cpus)
        if self._lib.bpf_map_lookup_elem(self._maps[name], struct.pack("<I", key), value) < 0:
            raise StepError("kernel-map-refused", f"a BPF map cannot be read: {os.strerror(self._ffi.errno)}")
        return bytes(self._ffi.buffer(value))


def _image(group: str) -> bytes:
    path = importlib.resources.files("cloister").joinpath("audit", "bpf", f"{group}.bpf.o")
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"the BPF object {group} is not in this installation"
        raise StepError("kernel-events-unavailable", message, remedy="cloister doctor") from error


def _reason(code: int, said: str) -> str:
    """Return a program's refusal in a few words; the verifier's last word where it has one."""
    name = errno.errorcode.get(code, str(code))
    lines = [line.strip() for line in said.splitlines() if line.strip() and "libbpf:" not in line]
    return f"{name}: {lines[-1][:200]}" if lines and code not in {errno.EPERM, errno.ESRCH} else name
