"""The parts `llm` and `tls` of the benchmarks: model calls beside nginx, aiohttp and LiteLLM, TLS beside mitmproxy.

Bounded to fifteen minutes: the first round is always whole, further rounds are measured while there is time.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Missing
from benchmarks.llm import cells, stacks, tables, terminated
from benchmarks.llm.names import LITELLM
from benchmarks.report import Grid

ROUNDS = 3
STACKS_S = 600.0
"""Until when a further round of the inference proxies may begin a cell."""
DESCRIPTORS = 16384
JSON_NOTE = """\
A closed loop over 1, 32 and 128 connections, 0.9 kB there and 0.9 kB back; each proxy pinned to one core, generator and
upstream (both C, one thread) to another. Every proxy but nginx checks who asks, reserves a budget, puts the real key
in, reads the usage, and writes a row; LiteLLM, in its cheapest set-up, without a database. Latency is the whole
answer; what is added, against no proxy at all. CPU is the proxy's own, per request, all threads. `others` is how many
cores were busy with other work meanwhile: beyond 0.2 read the CPU column and no other."""
SSE_NOTE = """\
The same with streams of 202 chunks, which the upstream writes as fast as it is read. How many chunks a proxy reads at
once decides here: who is slower merges more of them."""
PACED_NOTE = """\
128 streams at once, a chunk every 20 ms in each: 6,400 chunks a second. Each carries the time at which it was written;
its latency ends when it was read behind the proxy. Complete is a stream with all its chunks and its end."""
THOUSAND_NOTE = """\
A thousand streams at once, begun within a second, on all cores together with generator and upstream: 50,000 chunks a
second at the full pace, 10,000 at the lower. LiteLLM is left out: it cannot hold 128."""


def llm() -> list[Grid]:
    """Measure the inference proxies and return their tables."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, DESCRIPTORS), hard))
    with tempfile.TemporaryDirectory(prefix="cl-llm-") as name:
        return proxies(Path(name), cores())


def tls() -> list[Grid]:
    """Measure the proxies where TLS ends and return their table."""
    with tempfile.TemporaryDirectory(prefix="cl-tls-") as name:
        return terminated.terminated(Path(name), cores())


def cores() -> tuple[int, int]:
    """Return the core of the proxies, and that of the generator and the upstream."""
    first, *others = sorted(os.sched_getaffinity(0))
    return first, others[0] if others else first


def proxies(folder: Path, pinned: tuple[int, int]) -> list[Grid]:
    """Measure the inference proxies."""
    began = time.monotonic()
    upstream = stacks.upstream(folder, pinned[1])
    running: list[stacks.Stack] = []
    try:
        running, missing = stacks.started(folder, upstream.port, pinned[0])
        bench = cells.Bench(folder, upstream, running, pinned)
        samples = bench.rounds(cells.THOUSAND, 1, 0, [LITELLM])
        samples += bench.rounds(cells.CELLS, ROUNDS, began + STACKS_S)
        kept = [rows_kept(stack, bench.passed[stack.name]) for stack in running if stack.rows]
        idle = ", ".join(f"{stack.name} {stack.idle_mb:.0f}" for stack in running)
        kept.append(f"Memory before the first request, MB: {idle}.")
    finally:
        for stack in [*running, upstream]:
            stack.stop()
    for sample in samples:
        if sample.foreign >= cells.QUIET:
            print(f"    noisy: {sample.stack} {sample.cell.kind} {sample.foreign:.2f}", file=sys.stderr)
    return grids(samples, missing, " ".join(kept))


def rows_kept(stack: stacks.Stack, passed: int) -> str:
    """Say whether a ledger has a row for each request that reached the upstream: that the whole work was measured."""
    assert stack.rows
    until = time.monotonic() + 30
    while (rows := stack.rows()) < passed and time.monotonic() < until:
        time.sleep(0.2)
    said = f"The upstream answered {passed} requests of {stack.name}, whose ledger has {rows} rows."
    return said if rows >= passed else f"{said} **{passed - rows} rows are missing.**"


def grids(samples: list[cells.Sample], missing: list[Missing], kept: str) -> list[Grid]:
    """Return the tables of the inference proxies."""
    found = tables.results(samples)
    paced = next(cell for cell in cells.CELLS if cell.kind == "paced")
    small = tables.throughput(found, "json", "Inference proxy: small JSON", JSON_NOTE, missing)
    streams = tables.throughput(found, "sse", "Inference proxy: streams of 200 chunks", SSE_NOTE, missing)
    held = tables.paced(found, [paced], "Inference proxy: 128 streams at the pace of a model", PACED_NOTE, missing)
    thousand = tables.paced(
        found, cells.THOUSAND, "Inference proxy: 1,000 open streams", THOUSAND_NOTE, missing
    )  # fmt: skip
    return [
        small._replace(note=f"{small.note} {kept}".strip(), targets=tables.json_targets(found)),
        streams,
        held._replace(targets=tables.paced_targets(found, paced)),
        thousand._replace(targets=tables.thousand_targets(found, cells.THOUSAND)),
    ]
