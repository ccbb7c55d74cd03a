"""What the packet filter of agents' accounts costs: to load, to check, and for each connection.

    sudo PYTHONPATH=src:. python -m benchmarks.units.nft_apply

A program of its own, since only root loads packet filters: in network namespaces of its own, so the host's is never
touched. It renews its part of results.md and results.json as `make bench` does.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import world
from benchmarks.__main__ import PAGE
from benchmarks.figures import compare, interleave
from benchmarks.report import Part, Section, markdown
from benchmarks.store import as_json, merged

from cloister.egress.addresses import Guard
from cloister.egress.nft_units import AccountRules, ruleset
from cloister.host import firewall
from cloister.plan.unit import FIRST_UID

NAME = "filter"
COUNTS = (1, 100, 1000)
ROUNDS = 15
CONNECTIONS = 300
HERE, THERE, PORT = "93.184.216.1", "93.184.216.34", 8000
SERVER = f"""
import socket
server = socket.create_server(("{THERE}", {PORT}), backlog=512)
print("up", flush=True)
while True:
    server.accept()[0].close()
"""


def main() -> int:
    """Measure, and write the results."""
    if os.geteuid():
        sys.exit("run as root: nobody else loads packet filters")
    if len(sys.argv) == 1:
        command = ["unshare", "--net", "--", sys.executable, "-m", "benchmarks.units.nft_apply", "apart"]
        return subprocess.run(command, check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        places = firewall.Places(f"{folder}/firewall.nft", f"{folder}/expected")
        sections = [*_loading(places), _connecting()]
    part = Part(NAME, datetime.now(UTC).strftime("%Y-%m-%d"), sections)
    folder_path = Path(__file__).parents[1]
    earlier = folder_path / "results.json"
    host, parts = merged(earlier.read_text(), world.host({"nftables": ["nft", "--version"]}), [part], PAGE)
    (folder_path / "results.md").write_text(markdown(host, parts))
    earlier.write_text(as_json(host, parts))
    print(markdown(host, [part]))
    return 0


def _accounts(count: int) -> str:
    """Return the table of so many agents, all in mode `internet`; a tenth has rules of its own."""
    rules = ("tcp dport 25 counter reject with tcp reset",)
    return ruleset(
        AccountRules(f"cl-a{number}-alice", FIRST_UID + number, Guard(), statements=() if number % 10 else rules)
        for number in range(count)
    )


def _loading(places: firewall.Places) -> list[Section]:
    """Measure loading as `cloister apply` does it, as a boot does it, and the look before each start of a unit."""
    texts = {f"{count:,} agent{'s' if count > 1 else ''}": _accounts(count) for count in COUNTS}
    base = next(iter(texts))

    def boot(text: str) -> None:
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)

    def cases(act: Callable[[str], object]) -> Mapping[str, Callable[[], float]]:
        return {name: lambda text=text: _timed(lambda: act(text)) for name, text in texts.items()}

    loaded = interleave(cases(boot), ROUNDS)
    applied = interleave(cases(lambda text: firewall.install(text, places)), ROUNDS)
    looked: dict[str, list[float]] = {}
    for name, text in texts.items():
        firewall.install(text, places)
        looked |= interleave({name: lambda: _timed(lambda: firewall.trouble(places))}, ROUNDS)
    return [
        Section("Packet filter: loading at boot", "ms", compare(loaded, base), "`nft -f`, one transaction."),
        Section(
            "Packet filter: cloister apply", "ms", compare(applied, base),
            "Checked in a network namespace of its own, written, loaded, listed and compared.",
        ),
        Section(
            "Packet filter: the look before a unit starts", "ms", compare(looked, base),
            "The whole table listed and compared, only for units that share the host's network.",
        ),
    ]  # fmt: skip


def _connecting() -> Section:
    """Measure TCP connections to another network namespace, by an agent's uid and by another, with and without."""
    script = f"while ! ip address add {THERE}/24 dev far0 2>/dev/null; do sleep 0.05; done; ip link set far0 up"
    words = ["unshare", "--net", "--kill-child", "--fork", "--", "sh", "-c", f'{script}; exec "$0" -c "$1"']
    with subprocess.Popen([*words, sys.executable, SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            while os.readlink(f"/proc/{_child(server.pid)}/ns/net") == os.readlink("/proc/self/ns/net"):
                time.sleep(0.01)
            words = ["type", "veth", "peer", "name", "far0", "netns", str(_child(server.pid))]
            subprocess.run(["ip", "link", "add", "near0", *words], check=True)
            subprocess.run(["ip", "address", "add", f"{HERE}/24", "dev", "near0"], check=True)
            subprocess.run(["ip", "link", "set", "near0", "up"], check=True)
            assert server.stdout
            assert server.stdout.readline() == "up\n"
            none = "no table"
            cases: dict[str, Callable[[], float]] = {none: lambda: _connections("", FIRST_UID + 1)}
            cases["no table, again"] = cases[none]
            for count in COUNTS:
                text = _accounts(count + 1)
                cases[f"{count:,}, an agent's"] = lambda text=text: _connections(text, FIRST_UID + 1)
            cases[f"{COUNTS[-1]:,}, somebody else's"] = lambda: _connections(_accounts(COUNTS[-1]), 1000)
            samples = interleave(cases, ROUNDS)
        finally:
            server.kill()
    note = f"Between two network namespaces, {CONNECTIONS} connections in a row, by how many agents are in the table."
    return Section("Packet filter: one TCP connection", "µs", compare(samples, none), note)


def _child(pid: int) -> int:
    """Return the process that `unshare --fork` has started."""
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        time.sleep(0.01)
    return int(found[0])


def _connections(text: str, uid: int) -> float:
    """Load a table, connect many times as a uid, and return microseconds for one."""
    new = text or "table inet cloister {}\ndelete table inet cloister\n"
    subprocess.run(["nft", "-f", "-"], input=new, text=True, check=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setresuid(uid, uid, uid)
        os.write(writing, struct.pack("=d", _connect_all()))
        os._exit(0)
    os.close(writing)
    taken = os.read(reading, 8)
    os.close(reading)
    os.waitpid(child, 0)
    return float(struct.unpack("=d", taken)[0])


def _connect_all() -> float:
    began = time.perf_counter()
    for _ in range(CONNECTIONS):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))  # leaves no TIME_WAIT
            sock.connect((THERE, PORT))
    return (time.perf_counter() - began) / CONNECTIONS * 1e6


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    sys.exit(main())
