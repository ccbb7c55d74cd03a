"""One measurement after the other: every proxy in every round, in random order, the idle ones stopped.

Proxies run on one core, the load generator and the upstream on another. A cell is a load at a number of connections.
What others kept busy meanwhile is noted with each sample, and samples of noisy moments are left out where there are
quiet ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.llm import asking, usage
from benchmarks.llm.names import DIRECT, LITELLM
from benchmarks.llm.stacks import Stack

QUIET = 0.2
"""Cores that others may keep busy in a sample that counts."""
GATE_S = 3.0


class Cell(NamedTuple):
    """A load: what is asked, over how many connections, and for how long."""

    kind: str
    connections: int
    seconds: float
    warm: float = 0.5
    all_cores: bool = False

    @property
    def mode(self) -> str:
        """`open` for paced streams, which all begin and end once."""
        return "open" if self.kind in {"paced", "slow"} else "closed"


class Sample(NamedTuple):
    """What one load of one proxy gave."""

    stack: str
    cell: Cell
    load: asking.Load
    cpu_us: float
    """CPU of the proxy per answered request, microseconds; per stream where streams were asked."""
    memory_mb: float
    foreign: float


CELLS = (
    Cell("json", 1, 1.5), Cell("json", 32, 2.0), Cell("json", 128, 2.0),
    Cell("sse", 1, 1.5), Cell("sse", 32, 2.5), Cell("sse", 128, 3.0),
    Cell("paced", 128, 20.0),
)  # fmt: skip
THOUSAND = (Cell("paced", 1000, 30.0, 1.0, all_cores=True), Cell("slow", 1000, 45.0, 1.0, all_cores=True))


class Bench:
    """The stacks, the cores they run on, and the time there is."""

    def __init__(self, folder: Path, upstream: Stack, stacks: Sequence[Stack], cores: tuple[int, int]) -> None:
        """Write the requests; warm every proxy up, and stop it until it is measured."""
        self.folder = folder
        self.upstream = upstream
        self.stacks = [upstream, *stacks]
        self.cores = cores
        self.passed = {stack.name: 0 for stack in stacks}
        """Requests that reached the upstream through each proxy."""
        for stack in self.stacks:
            for kind in asking.MAX_TOKENS:
                path = folder / f"{stack.name}.{kind}.request"
                path.write_bytes(asking.request(kind, stack.headers))
                stack.files[kind] = path
        for stack in stacks:
            for kind in ("json", "sse"):
                self.sample(stack, Cell(kind, 4, 3.0 if stack.name == LITELLM else 0.5, 0.1))
            stack.signal(signal.SIGSTOP)

    def rounds(self, cells: Sequence[Cell], count: int, until: float, leave_out: Sequence[str] = ()) -> list[Sample]:
        """Measure each cell with each proxy: the first round is always whole, others end when the time is over."""
        samples = []
        for number in range(count):
            for cell in cells:
                stacks = [stack for stack in self.stacks if stack.name not in leave_out]
                random.shuffle(stacks)
                for stack in stacks:
                    if number and time.monotonic() > until:
                        return samples
                    if stack.name != DIRECT:
                        stack.signal(signal.SIGCONT)
                    self.wait_for_quiet()
                    samples.append(self.sample(stack, cell))
                    if stack.name != DIRECT:
                        time.sleep(0.1)
                        stack.signal(signal.SIGSTOP)
                print(f"    round {number + 1}: {cell.kind} {cell.connections}", file=sys.stderr, flush=True)
        return samples

    def sample(self, stack: Stack, cell: Cell) -> Sample:
        """Put one load on one proxy."""
        pids = stack.pids if stack.name != DIRECT else []
        if cell.all_cores:
            usage.let_run_on(pids, os.sched_getaffinity(0))
        counted, cpu, before = self.count(), usage.cpu_s(pids), self.clocks(pids)
        load = asking.load(
            cell.mode, stack.port, stack.files[cell.kind], cell.connections, cell.seconds, cell.warm, self.cores[1]
        )
        after, used = self.clocks(pids), usage.cpu_s(pids) - cpu
        memory = usage.memory_mb(pids)
        if cell.all_cores:
            usage.let_run_on(pids, [self.cores[0]])
        if stack.name != DIRECT:
            self.passed[stack.name] += self.settled() - counted
        return Sample(stack.name, cell, load, used * 1e6 / max(1, load.all), memory, before.foreign_until(after))

    def clocks(self, pids: Sequence[int]) -> usage.Clocks:
        """Read the clocks: of the machine, and of the proxy, the upstream, the generator and ourselves."""
        own = os.times()
        ours = usage.cpu_s([*pids, *self.upstream.pids]) + sum(own[:4])
        return usage.Clocks(usage.busy_s(), ours, time.monotonic())

    def count(self) -> int:
        """Return how many requests the upstream has answered."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.upstream.port}/count", timeout=10) as answer:
            return int(json.load(answer)["requests"])

    def settled(self) -> int:
        """Return the count when no more requests arrive: some are under way when the generator ends."""
        count, before = self.count(), -1
        while count != before:
            time.sleep(0.1)
            count, before = self.count(), count
        return count

    def wait_for_quiet(self) -> None:
        """Wait a little for others to be done; measure all the same when they are not."""
        until = time.monotonic() + GATE_S
        while time.monotonic() < until:
            before = self.clocks([])
            time.sleep(0.2)
            if before.foreign_until(self.clocks([])) < QUIET:
                return


def counting(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that count: the quiet ones, or all where none was quiet."""
    return [sample for sample in samples if sample.foreign < QUIET] or list(samples)


def middle(values: Sequence[float]) -> float:
    """Return the median, 0 of nothing."""
    return float(statistics.median(values)) if values else 0.0
