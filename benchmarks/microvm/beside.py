"""What a fill or a hand-back costs others: requests of another run through the same broker's relay, meanwhile.

The relay is the product's, on uvloop in this process; its client and the server behind it are processes of their own.
Work on the disk is done as the broker does it (a thread that waits for a child), and, for comparison, by a thread.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.policy.model import Egress
from cloister.relay.server import EgressServer
from cloister.relay.session import Session

PAUSE_S = 0.005
_ECHO = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
def serve(one):
    with one:
        while b"\\r\\n\\r\\n" not in one.recv(4096): pass
        one.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
_CLIENT = """
import json, select, socket, sys, time
path, port, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
host = f"127.0.0.1:{port}"
request = f"GET http://{host}/ HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode()
took = []
print("begun", flush=True)
while not select.select([sys.stdin], [], [], pause)[0]:
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)
        one.sendall(request)
        answer = b""
        while data := one.recv(4096): answer += data
    assert answer.startswith(b"HTTP/1.1 200"), answer
    took.append((time.perf_counter() - began) * 1000)
print(json.dumps(took), flush=True)
"""


def latencies(place: Path, work: Callable[[], object]) -> list[float]:
    """Return how many milliseconds each request took while `work` was done by a thread, sorted."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(place, work))


async def _measure(place: Path, work: Callable[[], object]) -> list[float]:
    loop, path, pipe = asyncio.get_running_loop(), place / "relay.sock", asyncio.subprocess.PIPE
    python = (sys.executable, "-I", "-c")
    far = await asyncio.create_subprocess_exec(*python, _ECHO, stdout=pipe)
    assert far.stdout is not None
    port = (await far.stdout.readline()).decode().strip()
    egress = Egress(allow=(f"127.0.0.1:{port}",), private=("127.0.0.1",))
    server = EgressServer(Session("run", compile_ruleset(egress, agent="a"), compile_guard(egress, agent="a")))
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(64)
    await server.start(sock)
    words = (str(path), port, str(PAUSE_S))
    client = await asyncio.create_subprocess_exec(*python, _CLIENT, *words, stdin=pipe, stdout=pipe, limit=1 << 24)
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        await client.stdout.readline()
        await loop.run_in_executor(None, work)
        client.stdin.close()
        took: list[float] = json.loads(await client.stdout.readline())
        await client.wait()
    finally:
        far.kill()
        await far.wait()
        await server.close()
    return sorted(took)
