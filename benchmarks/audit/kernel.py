"""What kernel events cost, and how many are kept: tables for `benchmarks.audit`. Needs root.

Overhead is CPU time of one program in a cgroup of its own, in turn, round by round: with nothing attached, with
processes and connections, with the calls that matter, with all calls, and under others. Here no limit per run is in
force and the reader keeps up, so that each event has its whole cost; the reader's own time is in another table. The
*unwatched* row is a process beside a watched run: it pays for the tracepoints of calls.

Not measured: auditd. Enabling the kernel's own audit once leaves some 90 ns on every system call until the next boot,
and a benchmark must not do that to a machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import Missing
from benchmarks.report import Grid, Line, Target

from cloister.audit import calls
from cloister.host import kernel_events, kernel_programs, kernel_watches

LOADS = {"getppid": 200_000, "openat + close": 50_000, "failing openat": 50_000, "fork + exec": 150}
"""What `load.c` makes, and how often."""
TRACED = 20
"""A tracer that stops each call gets so many times fewer of them."""
TREE = "/usr/include"
LINES = 300_000
FLOOD = 1_000_000
UNLIMITED = kernel_programs.Settings(rates=(0, 0))
BASE = "nothing attached"
WALL = "strace -f -c (of clock time)"
PEERS = {
    "bpftrace, count by call": "tracepoint:raw_syscalls:sys_enter /%s/ { @[args->id] = count(); }",
    "bpftrace, printf of openat":
        'tracepoint:syscalls:sys_enter_openat /%s/ { printf("%%s %%s\\n", comm, str(args->filename)); }',
}  # fmt: skip


TRACEFS = (
    "mount -t tracefs none /sys/kernel/tracing; mount -t debugfs none /sys/kernel/debug; "
    'exec bpftrace -B line -e "$1" 2>/dev/null'
)
"""What bpftrace needs to find tracepoints; the mounts are its own."""


class Cost(NamedTuple):
    """What one operation, or one command, took."""

    cpu: float
    clock: float


class Loads:
    """Programs to measure, in a cgroup or beside it."""

    def __init__(self, folder: Path, cgroup: Path) -> None:
        """Compile what is needed into `folder`."""
        here = Path(__file__).parent
        self._load, self.cgroup = str(folder / "load"), cgroup
        subprocess.run(["cc", "-O2", "-o", self._load, str(here / "load.c")], check=True)
        self._commands = {
            "gcc -O2": ["cc", "-O2", "-c", "-o", f"{folder}/gcc.o", str(here / "load.c"), *_included()],
            f"grep -r {TREE}": ["grep", "-r", "no such text anywhere", TREE],
        }

    @property
    def names(self) -> list[str]:
        """What is measured."""
        return [*LOADS, *self._commands]

    def cost(self, name: str, prefix: tuple[str, ...] = (), *, watched: bool = True, fewer: int = 1) -> Cost:
        """Measure one load: in nanoseconds per operation, or of a whole command."""
        command = self._commands.get(name) or [self._load, _word(name), str(max(20, LOADS[name] // fewer))]
        began = time.monotonic()
        process = self.start([*prefix, *command], watched=watched)
        assert process.stdout
        said = process.stdout.read()
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0  # collected already
        if name in self._commands:
            return Cost((used.ru_utime + used.ru_stime) * 1e9, (time.monotonic() - began) * 1e9)
        return Cost(*map(float, said.split()))

    def flood(self) -> subprocess.Popen[str]:
        """Start a million calls that fail."""
        return self.start([self._load, "failing-openat", str(FLOOD)])

    def start(self, command: list[str], *, watched: bool = True) -> subprocess.Popen[str]:
        """Start a command, in the cgroup or where this program is."""
        inside = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{self.cgroup}/cgroup.procs"] if watched else []
        return subprocess.Popen([*inside, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _word(name: str) -> str:
    return {"openat + close": "openat", "failing openat": "failing-openat", "fork + exec": "spawn"}.get(name, name)


def _included() -> list[str]:
    """Return options that make the compiler read as much as for an ordinary source file."""
    headers = ("linux/bpf.h", "linux/perf_event.h", "netinet/in.h", "sys/socket.h", "pthread.h", "regex.h", "math.h")
    return [word for header in headers for word in ("-include", header)]


@contextmanager
def attached(cgroup: Path, wanted: calls.Wanted, settings: kernel_programs.Settings) -> Iterator[_Attached]:
    """Load programs, watch a cgroup of our own, and have a reader of its rings."""
    with kernel_programs.Programs(settings) as programs:
        programs.load("process")
        root = os.open(kernel_watches.cgroup_tree(), os.O_RDONLY)
        programs.load("network", cgroup=root)
        os.close(root)
        if wanted != "off":
            programs.load("calls", shapes=calls.shapes(platform.machine(), wanted, files_elsewhere=False))
            programs.load("rings")
        found = kernel_watches.of_descriptor(descriptor := os.open(cgroup, os.O_RDONLY))
        os.close(descriptor)
        programs.configure([found.level] if found.level else range(1, 17), 0)
        programs.watch(found.key, 1, 0)
        sizes = (settings.critical_bytes, settings.bulk_bytes)
        maps = programs.maps
        reader = kernel_events.Reader(maps["critical"], maps["bulk"], sizes, kernel_events.boot_id())
        try:
            reader.name(1, {"run": "01k6v0000000000000000000", "agent": "pi", "user": "alice"})
            reader.describe([kernel_events.Call(*row) for row in calls.described(platform.machine())])
            yield _Attached(programs, reader)
        finally:
            reader.close()


class _Attached:
    """Programs of the kernel and the reader of what they make."""

    def __init__(self, programs: kernel_programs.Programs, reader: kernel_events.Reader) -> None:
        self.programs, self.reader = programs, reader
        self.lines, self.busy = 0, 0.0
        self._digest = bytes(32)

    def follow(self, out: Path, over: Callable[[], bool], share: float = 1.0) -> None:
        """Write lines until it is over and nothing waits; `share` of the time, the rest is slept."""
        with out.open("wb", buffering=0) as file:
            while True:
                ended, before = over(), time.thread_time()
                batch = self.reader.take(self.lines, self._digest)
                self.lines, self._digest = batch.seq, batch.hash
                file.write(batch.lines)
                self.reader.commit()
                used = time.thread_time() - before
                self.busy += used
                time.sleep(used * (1 / share - 1))
                if not batch.lines:
                    if ended:
                        return
                    time.sleep(0.005)

    @contextmanager
    def followed(self, out: Path) -> Iterator[None]:
        """Read beside what is measured."""
        over = threading.Event()
        thread = threading.Thread(target=self.follow, args=(out, over.is_set))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def overhead(loads: Loads, folder: Path, rounds: int) -> Grid:
    """Return what each costs: ratios of medians to nothing attached."""
    rows: dict[str, dict[str, list[float]]] = {}

    def note(row: str, name: str, value: float) -> None:
        rows.setdefault(row, {}).setdefault(name, []).append(value)

    for name in loads.names:  # what they read is in memory from now on
        loads.cost(name)
    for _ in range(rounds):
        for name in loads.names:
            note(BASE, name, loads.cost(name).cpu)
        for wanted, row in (
            ("off", "processes and connections"),
            ("security", "and calls that matter"),
            ("all", "and all calls"),
        ):
            with attached(loads.cgroup, wanted, UNLIMITED) as ours:
                out = folder / "lines.jsonl"
                for name in loads.names:
                    with ours.followed(out):
                        note(f'`syscalls = "{wanted}"`: {row}', name, loads.cost(name).cpu)
                    if wanted == "security":
                        note("the same, a process that is not watched", name, loads.cost(name, watched=False).cpu)
        _others(loads, note)
    return overhead_table(rows, loads.names)


def _others(loads: Loads, note: Callable[[str, str, float], None]) -> None:
    for row, program in PEERS.items() if shutil.which("bpftrace") else ():
        with contextlib.suppress(_NotStartedError), _bpftrace(program, loads.cgroup):
            for name in loads.names:
                note(row, name, loads.cost(name).cpu)
    for name in loads.names if shutil.which("strace") else ():
        plain = loads.cost(name, fewer=TRACED).clock
        traced = loads.cost(name, ("strace", "-f", "-c", "-o", "/dev/null"), fewer=TRACED).clock
        note(WALL, name, traced / plain)


class _NotStartedError(Exception):
    """A peer does not work on this machine."""


@contextmanager
def _bpftrace(program: str, cgroup: Path) -> Iterator[None]:
    """Run bpftrace beside, from when its programs are attached.

    Raises:
        _NotStartedError: it does not work here.
    """
    condition = f'cgroup == cgroupid("{cgroup}")'
    text = f'{program % condition} interval:ms:100 {{ printf("attached\\n"); }}'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", TRACEFS, "sh", text]
    tracer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert tracer.stdout
    for line in tracer.stdout:
        if line.startswith("attached"):
            break
    else:
        tracer.wait()
        raise _NotStartedError
    reader = threading.Thread(target=lambda: [None for _ in tracer.stdout or ()])
    reader.start()
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()
        reader.join()


def overhead_table(rows: dict[str, dict[str, list[float]]], names: list[str]) -> Grid:
    """Return ratios of medians; who is not there is named."""
    base = {name: statistics.median(rows[BASE][name]) for name in names}
    units = [f"{name}, x" for name in names]
    lines: list[Line | Missing] = [
        Line(f"{BASE}, µs of CPU time", {unit: base[name] / 1000 for unit, name in zip(units, names, strict=True)})
    ]
    for row, values in rows.items():
        by = {name: 1.0 if row == WALL else base[name] for name in names}
        found = {f"{name}, x": statistics.median(values[name]) / by[name] for name in names}
        lines.append(Line(row, found))
    for row, program in (*((row, "bpftrace") for row in PEERS), (WALL, "strace")):
        if row not in rows:
            lines.append(Missing(row, f"{program} is not installed, or does not work here"))
    lines.append(Missing("auditd", "what it switches on stays until the next boot: see the emulated guest"))
    reached = next(values for row, values in rows.items() if '"security"' in row)
    ratio = statistics.median(reached["openat + close"]) / base["openat + close"]
    said = f"Met: {ratio:.2f} x." if ratio <= 1.3 else f"Missed: {ratio:.2f} x."
    return Grid(
        "Audit: what being watched costs", units, lines,
        "CPU time of the watched program against nothing attached, medians of rounds in turn; strace is of clock time, "
        "as it works in another process. No limit per run is in force and a reader keeps up, so each event has its "
        "whole cost. Calls cost something for every process of a host while somebody is watched: the row of the one "
        "that is not.",
        [Target("a loop of openat, watched, ≤ 1.3 x", said)],
    )  # fmt: skip


def chained(folder: Path) -> Grid:
    """Return how many lines per second are chained and written."""
    line = b'{"time":1795241268455916095,"kind":"file.opened","run":"01k6v0000000000000000000","agent":"pi","x":"%s"}\n'
    objects = line % (b"y" * 300) * 1000
    path = folder / "chained.jsonl"
    seq, digest, began = 0, bytes(32), time.thread_time()
    with path.open("wb", buffering=0) as file:
        while seq < LINES:
            lines, seq, digest = kernel_events.chain_lines(objects, seq, digest)
            file.write(lines)
    rate = LINES / (time.thread_time() - began)
    path.unlink()
    said = f"{'Met' if rate >= 200_000 else 'Missed'}: {rate:,.0f}."
    row = Line("C", {"lines/s": int(rate), "bytes a line": len(objects) // 1000 + 100})
    return Grid(
        "Audit: chaining and writing", ["lines/s", "bytes a line"], [row], "Of one core's time, into a file.",
        [Target("≥ 200,000 lines/s", said)],
    )  # fmt: skip


def slowed(loads: Loads, folder: Path) -> Grid:
    """Return what is lost of a flood when the reader gets a part of a core only: the loss curve."""
    columns = ["made, events/s", "read, events/s", "lost, %", "sums differ by"]
    lines = []
    for share in (1.0, 0.2, 0.1, 0.05, 0.02):
        with attached(loads.cgroup, "security", UNLIMITED._replace(bulk_bytes=16 << 20)) as ours:
            began, flood = time.monotonic(), loads.flood()
            reading = threading.Thread(
                target=ours.follow, args=(folder / "slow.jsonl", lambda flood=flood: flood.poll() is not None, share)
            )
            reading.start()
            flood.wait()
            took, read = time.monotonic() - began, ours.lines
            reading.join()
            tally = kernel_programs.Counters(ours.programs.maps).tally(0, 1)
            differ = tally.made - ours.reader.counts().delivered[1] - tally.dropped - tally.limited
            figures = (int(tally.made / took), int(read / took), 100 * tally.dropped / tally.made, differ)
            lines.append(Line(f"{share:.0%} of a core", dict(zip(columns, figures, strict=True))))
    return Grid(
        "Audit: what a slow reader loses", columns, lines,
        "The same flood into a ring of 16 MiB; the reader sleeps for the rest of its time.", [],
    )  # fmt: skip


def flooded(loads: Loads, folder: Path) -> Grid:
    """Return what a reader keeps of a flood that no limit slows, for three sizes of the ring."""
    columns = ["made, events/s", "lost, %", "reader, events/s of its CPU time", "sums differ by"]
    lines = []
    for megabytes in (4, 16, 64):
        settings = UNLIMITED._replace(bulk_bytes=megabytes << 20)
        with attached(loads.cgroup, "security", settings) as ours:
            began, flood = time.monotonic(), loads.flood()
            ours.follow(folder / "flood.jsonl", lambda flood=flood: flood.poll() is not None)
            took, tally = time.monotonic() - began, kernel_programs.Counters(ours.programs.maps).tally(0, 1)
            flood.communicate()
            differ = tally.made - ours.reader.counts().delivered[1] - tally.dropped - tally.limited
            figures = (int(tally.made / took), 100 * tally.dropped / tally.made, int(ours.lines / ours.busy), differ)
            lines.append(Line(f"ring of {megabytes} MiB", dict(zip(columns, figures, strict=True))))
    exact = all(not line.values["sums differ by"] for line in lines)
    return Grid(
        "Audit: a flood of a million events", columns, lines,
        "One process makes failing calls of openat as quickly as it can; a limit per run, not in force here, keeps "
        "16 MiB a second of them.",
        [Target("no loss that is not counted", "Met." if exact else "Missed.")],
    )  # fmt: skip
