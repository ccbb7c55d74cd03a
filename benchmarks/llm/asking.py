"""The requests that are sent, and the load generator that sends them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.llm import programs

MODEL = "claude-sonnet-4-5"
# upstream.c tells the pace of a stream by max_tokens.
MAX_TOKENS = {"json": 256, "sse": 256, "paced": 777, "slow": 778}
CHUNKS = 200
OUT_OF_TIME_S = 120.0


class Load(NamedTuple):
    """What the generator counted; times in microseconds."""

    seconds: float
    all: int
    finished: int
    good: int
    refused: int
    broken: int
    incomplete: int
    most_open: int
    per_second: float
    p50: int
    p99: int
    most: int
    first_p50: int
    first_p99: int
    chunks: int
    chunk_p50: int
    chunk_p99: int
    chunk_most: int


def request(kind: str, headers: Sequence[str], path: str = "/v1/messages") -> bytes:
    """Return one request of 0.9 kB as Claude Code would write it, with the headers that let it pass."""
    said: dict[str, Any] = {"model": MODEL, "max_tokens": MAX_TOKENS[kind]}
    if kind != "json":
        said["stream"] = True
    said["messages"] = [{"role": "user", "content": "hello " * 100}]
    body = json.dumps(said, separators=(",", ":")).encode()
    head = [
        f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "anthropic-version: 2023-06-01",
        "anthropic-beta: prompt-caching-2024-07-31", "User-Agent: bench/1", *headers, f"Content-Length: {len(body)}",
    ]  # fmt: skip
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def load(  # noqa: PLR0913  (the generator's own words)
    mode: str, port: int, path: Path, connections: int, seconds: float, warm: float, core: int
) -> Load:
    """Run the generator on one core.

    Raises:
        CalledProcessError: it could not connect.
        TimeoutExpired: it did not end.
    """
    argv = [
        "taskset", "-c", str(core), programs.built("load"), mode, f"127.0.0.1:{port}", str(path), str(connections),
        str(seconds), str(warm),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + OUT_OF_TIME_S, check=True)
    return Load(**json.loads(done.stdout))
