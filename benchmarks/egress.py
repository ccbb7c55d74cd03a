"""What the way out costs: through forwarder and relay, against a veth pair and against a bare Unix socket."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.figures import compare
from benchmarks.report import Section
from benchmarks.world import AGENT, World

TRAFFIC = Path(__file__).with_name("traffic.py")
HOST = "host.cloister.internal"
PROXY = "127.0.0.1:3128"
THROUGHPUT_TARGET, LATENCY_TARGET = 0.9, 3.0
VETH, DIRECT, TUNNEL, HTTP = "veth pair", "Unix socket, direct", "cloister, CONNECT", "cloister, plain HTTP"
# Both namespaces belong to one user namespace of our own; nothing of the host's network is touched.
VETH_SCRIPT = """\
set -e
far='echo $$; read go; ip addr add 10.213.7.2/24 dev v1; ip link set v1 up; exec python3 "$0" serve 10.213.7.2:7000'
unshare --net sh -c "$far >/dev/null" "$1" <"$2/go" >"$2/out" &
exec 3>"$2/go"
read pid <"$2/out"
ip link add v0 type veth peer name v1
ip link set v1 netns "$pid"
ip addr add 10.213.7.1/24 dev v0
ip link set v0 up
echo >&3
sleep 0.5
python3 "$1" direct 10.213.7.2:7000 -
kill "$pid"
"""


def egress(rounds: int) -> list[Section]:
    """Throughput of one large download, and the time to the first byte of a new connection."""
    with server("127.0.0.1:0") as port:
        policy = "schema = 1\n\n" + AGENT.format(name="shell")
        policy += f'\n[agents.shell.egress]\nallow = ["{HOST}:{port}"]\n'
        world = World("egress", policy)
        try:
            return measure(world, port, rounds)
        finally:
            world.close()


def measure(world: World, port: str, rounds: int) -> list[Section]:
    """Take the figures of all routes in turn."""
    script = world.project / "traffic.py"
    shutil.copy(TRAFFIC, script)
    with server(str(world.home / "direct.sock")) as path:
        python = ["cloister", "run", "shell", "--", "/usr/bin/python3", str(script)]
        target = f"{HOST}:{port}"
        routes: dict[str, Callable[[], list[float]]] = {
            VETH: lambda: veth(world),
            DIRECT: lambda: output(world, [sys.executable, str(TRAFFIC), "direct", path, "-"]),
            TUNNEL: lambda: output(world, [*python, "connect", PROXY, target]),
            HTTP: lambda: output(world, [*python, "http", PROXY, target]),
        }
        figures = [{name: route() for name, route in routes.items()} for _ in range(rounds)]
    return [throughput(figures), latency(figures)]


def throughput(figures: list[dict[str, list[float]]]) -> Section:
    """Seconds for 200 MiB, so that less is better as in the other tables."""
    samples = {name: [200 / one[name][0] * 1000 for one in figures] for name in figures[0]}
    rows = compare(samples, VETH)
    speed = 1 / min(row.ratio_of_minima for row in rows if row.name == TUNNEL)
    verdict = "Met" if speed >= THROUGHPUT_TARGET else "Missed"
    return Section(
        "Egress: 200 MiB down", "ms", rows,
        "A sender in Python outside, a receiver in Python inside. The veth pair joins two network namespaces made for "
        "it. Cloister's bytes go through the forwarder (in the sandbox) and the relay (in the broker) as well: a "
        "tunnel by splice(2), plain HTTP through the parser. That is four busy processes where the veth has two, so "
        "with two cores the ratio cannot reach that of an idle machine with four.",
        f"throughput ≥ {THROUGHPUT_TARGET:g} of veth", f"{verdict}: {speed:.2g} of veth.",
    )  # fmt: skip


def latency(figures: list[dict[str, list[float]]]) -> Section:
    """Microseconds from connect to the first byte back."""
    rows = compare({name: [one[name][1] for one in figures] for name in figures[0] if name != HTTP}, VETH)
    ratio = next(row.ratio_of_minima for row in rows if row.name == TUNNEL)
    verdict = "Met" if ratio <= LATENCY_TARGET else "Missed"
    return Section(
        "Egress: a new connection", "µs", rows,
        "Connect, one byte there, one byte back: the median of 200. Through Cloister that is two connections more, a "
        "CONNECT, the decision, and a line in the events.",
        f"≤ {LATENCY_TARGET:g} x veth", f"{verdict}: {ratio:.2g} x.",
    )  # fmt: skip


@contextmanager
def server(address: str) -> Iterator[str]:
    """Run the sender; give the port it chose, or its path."""
    process = subprocess.Popen([sys.executable, str(TRAFFIC), "serve", address], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def output(world: World, argv: list[str]) -> list[float]:
    """Run a client; return its two figures."""
    done = subprocess.run(
        argv, cwd=world.project, env=world.environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr}")
    figures: list[float] = json.loads(done.stdout)
    return figures


def veth(world: World) -> list[float]:
    """Measure between two network namespaces."""
    pipes = world.home / "veth"
    pipes.mkdir(exist_ok=True)
    for name in ("go", "out"):
        (pipes / name).unlink(missing_ok=True)
    subprocess.run(["mkfifo", str(pipes / "go"), str(pipes / "out")], check=True)
    alone = ["unshare", "--user", "--map-root-user", "--net", "--kill-child", "--fork", "--pid"]
    return output(world, [*alone, "sh", "-c", VETH_SCRIPT, "sh", str(TRAFFIC), str(pipes)])
