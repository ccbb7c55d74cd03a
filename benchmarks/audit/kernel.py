"""What kernel events cost and how many are kept: `PYTHONPATH=src:tests:. python -m benchmarks.audit.kernel`, as root.

Overhead is CPU time per operation of one program, in turn, round by round: with nothing attached, with processes and
connections, with the calls that matter, with all calls, and under strace(1). The *unwatched* row is a process beside a
watched run: it pays for the tracepoints of calls. Then: how many lines per second C chains and writes, and how many
events per second a reader keeps, and loses, of a flood without a limit per run.

Not measured: auditd. Enabling the kernel's own audit once leaves some 90 ns on every system call until the next boot
(FINDINGS), and a benchmark must not do that to a machine. bpftrace compiles when it starts and is not installed here.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloister.audit import calls
from cloister.host import kernel_events, kernel_programs, kernel_watches

LOADS = {"getppid": 200_000, "openat": 50_000, "failing-openat": 50_000, "spawn": 150}
ROUNDS = 7
LINES = 300_000
FLOOD = 1_000_000
SOURCE = Path(__file__).with_name("load.c")


@contextmanager
def watched(
    folder: Path, wanted: calls.Wanted, settings: kernel_programs.Settings
) -> Iterator[kernel_programs.Programs]:
    """Load programs and watch a cgroup of our own, `folder`."""
    with kernel_programs.Programs(settings) as programs:
        programs.load("process")
        root = os.open(kernel_watches.cgroup_tree(), os.O_RDONLY)
        programs.load("network", cgroup=root)
        os.close(root)
        if wanted != "off":
            programs.load("calls", shapes=calls.shapes(platform.machine(), wanted, files_elsewhere=False))
            programs.load("rings")
        found = kernel_watches.of_descriptor(descriptor := os.open(folder, os.O_RDONLY))
        os.close(descriptor)
        programs.configure([found.level] if found.level else range(1, 17), 0)
        programs.watch(found.key, 1, 0)
        yield programs


def reader_of(programs: kernel_programs.Programs) -> kernel_events.Reader:
    """Return a reader of these rings."""
    sizes = (programs.settings.critical_bytes, programs.settings.bulk_bytes)
    one = kernel_events.Reader(programs.maps["critical"], programs.maps["bulk"], sizes, kernel_events.boot_id())
    one.name(1, {"run": "01k6v0000000000000000000", "agent": "pi", "user": "alice"})
    one.describe([kernel_events.Call(*row) for row in calls.described(platform.machine())])
    return one


def start(folder: str, command: list[str]) -> subprocess.Popen[str]:
    """Start a command in a cgroup; an empty one is ours."""
    if not folder:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    inside = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{folder}/cgroup.procs", *command]
    return subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)


def cost(load: str, name: str, folder: str, prefix: tuple[str, ...] = (), many: int = 0) -> float:
    """Return nanoseconds per operation; under a tracer, of wall time."""
    many = many or LOADS[name]
    began = time.monotonic()
    said = start(folder, [*prefix, load, name, str(many)]).communicate()[0]
    return (time.monotonic() - began) / many * 1e9 if prefix else float(said.split()[-1])


def overhead(load: str, folder: Path, rounds: int) -> None:
    """Print the table of costs, ratios to nothing attached."""
    rows: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name in LOADS:
            rows.setdefault("nothing", {}).setdefault(name, []).append(cost(load, name, str(folder)))
        for wanted, label in (("off", "processes and connections"), ("security", "security"), ("all", "all")):
            with watched(folder, wanted, kernel_programs.Settings()) as programs:
                reader = reader_of(programs)
                for name in LOADS:
                    rows.setdefault(label, {}).setdefault(name, []).append(cost(load, name, str(folder)))
                    if wanted == "security":
                        rows.setdefault("security, unwatched", {}).setdefault(name, []).append(cost(load, name, ""))
                    while reader.take(0, bytes(32)).lines:
                        reader.commit()
                reader.close()
    if shutil.which("strace"):
        for name, many in LOADS.items():
            few = max(20, many // 100)
            traced = cost(load, name, str(folder), ("strace", "-f", "-c", "-o", "/dev/null"), few)
            rows.setdefault("strace -f -c (wall)", {})[name] = [traced]
    base = {name: statistics.median(rows["nothing"][name]) for name in LOADS}
    print(f"| | {' | '.join(LOADS)} |\n|---|{'---|' * len(LOADS)}")
    print(f"| nothing attached, ns | {' | '.join(f'{base[name]:,.0f}' for name in LOADS)} |")
    for label, values in rows.items():
        print(f"| {label} | {' | '.join(f'{statistics.median(values[name]) / base[name]:.2f}' for name in LOADS)} |")


def chained(folder: Path) -> None:
    """Print how many lines per second are chained and written."""
    line = b'{"time":1795241268455916095,"kind":"file.opened","run":"01k6v0000000000000000000","agent":"pi","x":"%s"}\n'
    objects = line % (b"y" * 300) * 1000
    path = folder / "chained.jsonl"
    seq, digest, began = 0, bytes(32), time.thread_time()
    with path.open("wb", buffering=0) as file:
        while seq < LINES:
            lines, seq, digest = kernel_events.chain_lines(objects, seq, digest)
            file.write(lines)
    print(f"chain and write: {LINES / (time.thread_time() - began):,.0f} lines/s of {len(objects) // 1000 + 100} bytes")
    path.unlink()


def flooded(load: str, folder: Path, out: Path) -> None:
    """Print what a reader keeps of a flood that no limit slows, for three sizes of the ring."""
    for megabytes in (4, 16, 64):
        settings = kernel_programs.Settings(bulk_bytes=megabytes << 20, rates=(0, 0))
        with watched(folder, "security", settings) as programs, (out / "flood.jsonl").open("wb", buffering=0) as file:
            reader = reader_of(programs)
            flood = start(str(folder), [load, "failing-openat", str(FLOOD)])
            seq, digest, busy, began = 0, bytes(32), 0.0, time.monotonic()
            while True:
                ended, before = flood.poll() is not None, time.thread_time()
                batch = reader.take(seq, digest)
                seq, digest = batch.seq, batch.hash
                file.write(batch.lines)
                reader.commit()
                busy += time.thread_time() - before
                if not batch.lines:
                    if ended:
                        break
                    time.sleep(0.005)
            took, tally = time.monotonic() - began, kernel_programs.Counters(programs.maps).tally(0, 1)
            counts = reader.counts()
            reader.close()
        exact = counts.delivered[1] + tally.dropped + tally.limited == tally.made
        lost = 100 * tally.dropped / tally.made
        told = f"{tally.made / took:,.0f} events/s made, {lost:.1f} % lost, sums {'agree' if exact else 'DIFFER'}"
        print(f"ring of {megabytes} MiB: {told}; reader: {seq / busy:,.0f} events/s of its CPU time")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.audit.kernel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    cgroup = Path(kernel_watches.cgroup_tree()) / f"cloister-bench-{os.getpid()}"
    cgroup.mkdir()
    try:
        with tempfile.TemporaryDirectory() as name:
            load = f"{name}/load"
            subprocess.run(["cc", "-O2", "-o", load, str(SOURCE)], check=True)
            chained(Path(name))
            flooded(load, cgroup, Path(name))
            overhead(load, cgroup, options.rounds)
    finally:
        cgroup.rmdir()


if __name__ == "__main__":
    main()
