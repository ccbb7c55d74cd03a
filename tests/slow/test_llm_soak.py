"""An hour at load: flat memory, no row lost, and one agent that misbehaves all the time while another one works.

CLOISTER_SOAK_S sets another length in seconds. The working agent's load comes from the benchmark's generator (small
JSON, streams as fast as they go, streams at the pace of a model); the other one's upstream and clients do at random
what tests/kernel/llm/test_faults.py does one by one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.llm import asking, programs

from support.inference import DELTA, FIRST_EVENT, KEYS, STREAM_HEAD, Proxy, Scripted, answer, chunk, request

SECONDS = float(os.environ.get("CLOISTER_SOAK_S") or 3600)
MIXED = (("closed", "json", 16, 2.0), ("closed", "sse", 16, 2.0), ("open", "paced", 60, 30.0))
"""One turn of load: mode and kind, connections, and seconds (the streams end by themselves after four)."""
GROWTH_MB = 24.0
SLOWEST_US = 5_000_000
CORE = 0
BEGUN = STREAM_HEAD + chunk(FIRST_EVENT) + chunk(DELTA)

CHANCE = random.Random(3)  # noqa: S311 - for variety, not for secrets


def misbehave(conn: socket.socket, data: bytes) -> bool:
    """Answer as one of many bad upstreams, or as a good one."""
    kind = CHANCE.randrange(8)
    if kind == 0:
        return False
    if kind == 1:
        conn.sendall(BEGUN)
        return False
    if kind == 2:
        conn.sendall(BEGUN + b"zz\r\ngarbage")
        return False
    if kind == 3:
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        return False
    if kind == 4:
        conn.sendall(b"HTTP/1.1 529 Overloaded\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        return True
    if kind == 5:
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + DELTA * 1000)
        return False
    if kind == 6:
        time.sleep(0.2)
    return answer(conn, data)


def bother(port: int) -> None:
    """Be one of many bad clients."""
    whole = request(stream=CHANCE.random() < 0.5)
    kind = CHANCE.randrange(6)
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as conn:
        if kind == 0:
            conn.sendall(whole[: CHANCE.randrange(len(whole))])
        elif kind == 1:
            conn.sendall(whole)
        elif kind == 2:
            conn.sendall(whole.replace(b"Content-Length:", b"Transfer-Encoding: chunked\r\nContent-Length:"))
            conn.recv(65536)
        elif kind == 3:
            conn.sendall(b"POST /v1/messages HTTP/1.1\r\n" + b"X: " + b"a" * (1 << 20))
        else:
            conn.sendall(whole)
            while conn.recv(65536):
                pass


class Nuisance:
    """Four bad clients at a time, until told to stop."""

    def __init__(self, port: int) -> None:
        """Begin."""
        self.over = threading.Event()
        self.count = itertools.count()
        self.threads = [threading.Thread(target=self._work, args=(port,), daemon=True) for _ in range(4)]
        for thread in self.threads:
            thread.start()

    def _work(self, port: int) -> None:
        while not self.over.wait(0.02):
            bother(port)
            next(self.count)

    def stop(self) -> int:
        """Stop; return how often it tried."""
        self.over.set()
        for thread in self.threads:
            thread.join(30)
        return next(self.count)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_an_hour_at_load_leaves_memory_flat_and_every_row_written(tmp_path: Path):
    """The working agent's every answer is whole and quick, its rows are the upstream's count, and memory stays."""
    with subprocess.Popen([programs.built("upstream")], stdout=subprocess.PIPE, text=True) as steady:
        assert steady.stdout
        steady_port = int(steady.stdout.readline())
        with Scripted(misbehave) as bad:
            proxy = Proxy(tmp_path / "proxy", bad.port, steady_port).start()
            nuisance = Nuisance(proxy.port)
            try:
                memory = work(proxy, tmp_path, time.monotonic() + SECONDS)
                tried = nuisance.stop()
                time.sleep(1)
                served = count(steady_port)
            finally:
                nuisance.over.set()
                proxy.end()
                steady.kill()
            assert tried > SECONDS
            assert "Traceback" not in proxy.log, proxy.log[-3000:]
            check_rows(proxy, served, len(bad.requests))
    settled = max(memory[: max(2, len(memory) // 4)])
    assert max(memory[-3:]) < settled + GROWTH_MB, memory


def work(proxy: Proxy, folder: Path, until: float) -> list[float]:
    """Put load on it until the time is over; return its memory after each turn."""
    files = {}
    for _, kind, _, _ in MIXED:
        files[kind] = folder / f"{kind}.request"
        files[kind].write_bytes(asking.request(kind, [f"Authorization: Bearer {KEYS['other']}"]))
    memory = []
    while time.monotonic() < until or len(memory) < 3:
        for mode, kind, connections, seconds in MIXED:
            load = asking.load(mode, proxy.port, files[kind], connections, seconds, 0.5, CORE)
            assert load.good == load.finished > 0, (kind, load)
            assert load.most < SLOWEST_US, (kind, load)
            if kind == "paced":
                assert load.good == connections
                assert load.chunk_p99 < 500_000, load
        memory.append(proxy.memory_mb())
    return memory


def count(port: int) -> int:
    """Return how many requests the steady upstream has answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as conn:
        conn.sendall(b"GET /count HTTP/1.1\r\n\r\n")
        return int(conn.recv(4096).partition(b'"requests":')[2].partition(b",")[0])


def check_rows(proxy: Proxy, served: int, bad: int) -> None:
    """Each request that reached an upstream has one row; the bad agent's refused ones have none that cost."""
    rows: list[dict[str, Any]] = proxy.rows()
    assert len(rows) == len({row["id"] for row in rows})
    sent = [row for row in rows if row["outcome"] != "refused"]
    assert sum(row["agent"] == "other" for row in sent) == served
    # A kept connection that breaks before any answer is taken for a stale one, and the call is sent once more.
    assert sum(row["attempts"] for row in sent if row["agent"] == "agent") >= bad > 0
    assert not [row for row in sent if row["outcome"] == "unknown"]
    for row in sent:
        if row["agent"] == "other" and row["outcome"] == "complete":
            assert (row["source"], row["status"]) == ("provider", 200)
