"""The proxies that are compared: how each is started in front of the upstream, and how a request passes it.

Each is started as its documents say, in its cheapest set-up: one worker, no access log, no buffering.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import Missing
from benchmarks.llm import asking, cloister_proxy, programs, usage
from benchmarks.llm.names import AIOHTTP, DIRECT, LITELLM, NGINX, OURS

REAL_KEY = "made-up-key-of-the-owner"
START_S = 120.0
NGINX_CONF = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 64m;
    keepalive_requests 1000000000;
    upstream model {{
        server 127.0.0.1:{upstream};
        keepalive 2048;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://model;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Authorization "";
            proxy_set_header x-api-key {key};
            proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""
LITELLM_CONF = """\
model_list:
  - model_name: {model}
    litellm_params: {{model: anthropic/{model}, api_base: "http://127.0.0.1:{upstream}", api_key: {key}}}
litellm_settings: {{num_retries: 0, telemetry: false}}
general_settings: {{master_key: {master}}}
"""


@dataclass
class Stack:
    """One proxy that runs, or the upstream itself."""

    name: str
    port: int
    headers: Sequence[str] = ()
    process: subprocess.Popen[str] | None = None
    idle_mb: float = 0.0
    rows: Callable[[], int] | None = None
    """How many rows its ledger has, where it keeps one that can be compared with the upstream's count."""
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return usage.family(self.process.pid) if self.process else []

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """End it, all of it."""
        if self.process:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()


def free_port() -> int:
    """Return a port that was free a moment ago, for programs that cannot choose one themselves."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def start(  # noqa: PLR0913  (what a process needs)
    folder: Path, name: str, argv: Sequence[str], core: int, port: int = 0, environment: dict[str, str] | None = None
) -> tuple[subprocess.Popen[str], str]:
    """Start a program on a core; wait until it listens on `port`, or until it prints a line, and return that.

    Raises:
        RuntimeError: it ended, or never listened; with the last lines it wrote.
    """
    log = folder / f"{name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *argv], stdin=subprocess.DEVNULL, stderr=errors, text=True, cwd=folder,
            stdout=errors if port else subprocess.PIPE, env={**os.environ, **(environment or {})},
        )  # fmt: skip
    if port:
        until = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return process, ""
            time.sleep(0.05)
    elif process.stdout and (line := process.stdout.readline().strip()):
        return process, line
    process.kill()
    process.wait()
    raise RuntimeError(f"{name} does not start: {log.read_text()[-2000:]}")


def upstream(folder: Path, core: int) -> Stack:
    """Start the upstream."""
    process, port = start(folder, "upstream", [programs.built("upstream")], core)
    return Stack(DIRECT, int(port), [f"x-api-key: {REAL_KEY}"], process)


def nginx(folder: Path, upstream_port: int, core: int) -> Stack:
    """Start nginx: `proxy_pass` with keep-alive and without buffering. It checks nothing: the floor."""
    port = free_port()
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, port=port, upstream=upstream_port, key=REAL_KEY))
    process, _ = start(folder, NGINX, [programs.nginx(), "-c", str(conf), "-p", str(folder)], core, port)
    return Stack(NGINX, port, ["Authorization: Bearer made-up-placeholder"], process)


def aiohttp(folder: Path, upstream_port: int, core: int) -> Stack:
    """Start our own proxy on aiohttp."""
    program = str(programs.HERE / "aiohttp_proxy.py")
    process, line = start(folder, AIOHTTP, [sys.executable, program, str(upstream_port), str(folder)], core)
    said = json.loads(line)
    return Stack(AIOHTTP, said["port"], [f"Authorization: Bearer {said['token']}"], process)


def litellm(folder: Path, upstream_port: int, core: int) -> Stack:
    """Start LiteLLM with a master key and without a database: its cheapest set-up."""
    port, master = free_port(), f"sk-{secrets.token_hex(32)}"
    conf = folder / "litellm.yaml"
    conf.write_text(LITELLM_CONF.format(model=asking.MODEL, upstream=upstream_port, key=REAL_KEY, master=master))
    argv = [
        programs.peer("litellm"),
        "--config",
        str(conf),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    quiet = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    process, _ = start(folder, LITELLM, argv, core, port, quiet)
    return Stack(LITELLM, port, [f"Authorization: Bearer {master}"], process)


def ours(folder: Path, upstream_port: int, core: int) -> Stack:
    """Start Cloister's inference proxy with a policy that checks everything and refuses nothing."""
    setup = cloister_proxy.prepare(folder, upstream_port, REAL_KEY)
    process, url = start(folder, OURS, setup.argv, core, environment=setup.environment)
    port = int(url.rpartition(":")[2])
    return Stack(OURS, port, [f"Authorization: Bearer {setup.token}"], process, rows=setup.rows)


def started(folder: Path, upstream_port: int, core: int) -> tuple[list[Stack], list[Missing]]:
    """Start all that are there; name the others."""
    makers: dict[str, tuple[Callable[[Path, int, int], Stack], str]] = {
        NGINX: (nginx, "" if programs.nginx() else "nginx is not installed"),
        OURS: (ours, ""),
        AIOHTTP: (aiohttp, ""),
        LITELLM: (litellm, "" if programs.peer("litellm") else "LiteLLM is not installed"),
    }
    stacks: list[Stack] = []
    missing = []
    try:
        for name, (make, reason) in makers.items():
            if reason:
                missing.append(Missing(name, reason))
                continue
            print(f"    starting {name}", file=sys.stderr, flush=True)
            stack = make(folder, upstream_port, core)
            stacks.append(stack)
            stack.idle_mb = usage.memory_mb(stack.pids)
    except BaseException:
        for stack in stacks:
            stack.stop()
        raise
    return stacks, missing
