"""The forwarder carries loopback connections of the sandbox to the relay's Unix socket, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from shim_rig import Rig, Run, family, rig_of_test

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

# PID 1 of the sandbox is not dumpable: its /proc is closed even to its own user.
sees_inside = pytest.mark.root

CONNECT = "import socket, sys, time, os\ndef c(h='127.0.0.1'): return socket.create_connection((h, 3128), 10)\n"


def inside(rig: Rig, script: str, **options: object) -> tuple[int, bytes, bytes]:
    """Run Python in the sandbox."""
    return Run(rig, **options).complete("/usr/bin/python3", "-c", CONNECT + script)


def test_a_connection_is_carried(rig: Rig) -> None:
    """Bytes go to the relay and come back, over IPv4 and IPv6 loopback."""
    script = "for h in ('127.0.0.1', '::1'):\n s = c(h); s.sendall(b'echo\\nhello'); print(s.recv(99).decode())"
    assert inside(rig, script) == (0, b"hello\nhello\n", b"")


def test_without_listen_there_is_no_forwarder(rig: Rig) -> None:
    """No --listen, no open port: the connect is refused."""
    code, _, err = inside(rig, "c()", listen=False)
    assert code == 1
    assert b"ConnectionRefusedError" in err


def test_several_ports_lead_to_the_same_relay(rig: Rig) -> None:
    """Every --listen is served, on both families; a port that nobody named is closed."""
    script = """
for port in (3128, 11435):
    for host in ('127.0.0.1', '::1'):
        s = socket.create_connection((host, port), 10); s.sendall(b'echo\\nhello'); print(port, s.recv(99).decode())
try: socket.create_connection(('127.0.0.1', 11436), 10)
except ConnectionRefusedError: print('closed')
"""
    expected = b"3128 hello\n3128 hello\n11435 hello\n11435 hello\nclosed\n"
    assert inside(rig, script, options=["--listen", "127.0.0.1:11435"]) == (0, expected, b"")


def test_half_close_is_kept_apart(rig: Rig) -> None:
    """The end of the request travels, and the answer still comes: both directions end on their own."""
    script = """
for size in (0, 1, 10_000_000):
    s = c(); s.sendall(b'count\\n' + bytes(size)); s.shutdown(socket.SHUT_WR)
    got = b''
    while d := s.recv(4096): got += d
    print(int(got))
"""
    assert inside(rig, script) == (0, b"0\n1\n10000000\n", b"")


def test_the_relays_end_reaches_the_client(rig: Rig) -> None:
    """All bytes arrive before the end does, also when the client reads late."""
    script = """
s = c(); s.sendall(b'source 33554432\\n'); time.sleep(0.3); n = 0
while d := s.recv(1 << 20): n += len(d)
print(n)
"""
    assert inside(rig, script) == (0, b"33554432\n", b"")


def test_a_slow_reader_holds_back_its_own_sender_only(rig: Rig) -> None:
    """Back-pressure: memory stays small while a client does not read, and others are served."""
    script = """
slow = c(); slow.sendall(b'source 268435456\\n'); time.sleep(0.5)
s = c(); s.sendall(b'echo\\nok'); print(s.recv(9).decode(), flush=True); sys.stdin.read()
"""
    run = Run(rig)
    run.go("/usr/bin/python3", "-c", CONNECT + script.replace("sys.stdin.read()", "time.sleep(0.5)"))
    assert run.process.stdout.readline() == b"ok\n" if run.until("inner", "R") else False
    assert inner_pss_kib(run) < 1024
    assert run.wait() == 0
    run.close()


@sees_inside
def test_both_halves_are_small_and_idle(rig: Rig) -> None:
    """Both halves of an idle run have little memory of their own beside their program's, and use no CPU time."""
    run = Run(rig)
    run.go("sleep", "60")
    run.until("inner", "R")
    halves = [pid for pid in family(run.process.pid) if b"cloister-shim\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    shims = [pid for pid in halves if b"bwrap" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(shims) == 2
    assert sum(_kib(pid, "Pss_Anon:") for pid in shims) < 512
    assert sum(_kib(pid, "Pss:") for pid in shims) < 512 + os.stat(rig.shim).st_size // 1024
    before = [_ticks(pid) for pid in shims]
    time.sleep(0.5)
    assert [_ticks(pid) for pid in shims] == before
    run.process.terminate()
    assert run.wait() == 143
    run.close()


def test_a_thousand_connections_at_once(rig: Rig) -> None:
    """A thousand open connections work, more than the relay's backlog takes at once, and use little memory."""
    script = """
import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
s = [c() for _ in range(1000)]
for n, x in enumerate(s): x.sendall(b'echo\\n%d\\n' % n)
assert all(int(x.recv(99)) == n for n, x in enumerate(s))
print('all', flush=True); time.sleep(0.3)
"""
    run = Run(rig)
    run.go("/usr/bin/python3", "-c", CONNECT + script)
    run.until("inner", "R")
    assert run.process.stdout.readline() == b"all\n", run.process.stderr.read()
    assert rig.relay.most >= 1000
    assert inner_pss_kib(run) < 2048
    assert run.wait() == 0
    run.close()


def test_a_vanished_relay_refuses_at_once(rig: Rig) -> None:
    """When the relay's socket is gone a client gets an error now, not a hang; PID 1 goes on."""
    script = """
s = c(); s.sendall(b'echo\\n1'); assert s.recv(1) == b'1'; print('up', flush=True)
while os.path.exists(%r): time.sleep(0.01)
t = time.time()
try: x = c(); x.sendall(b'x'); got = x.recv(1)
except ConnectionError: got = b''
print(got, time.time() - t < 1)
""" % str(rig.relay.path)  # noqa: UP031 - the script is full of braces
    run = Run(rig)
    run.go("/usr/bin/python3", "-c", CONNECT + script)
    run.until("inner", "R")
    assert run.process.stdout.readline() == b"up\n"
    rig.relay.path.unlink()
    assert run.process.stdout.readline() == b"b'' True\n"
    assert run.wait() == 0
    run.close()


@sees_inside
def test_a_reset_client_frees_its_connection(rig: Rig) -> None:
    """Clients that vanish with a reset, or in the middle of a transfer, leave no connection behind at the relay."""
    script = """
import struct
for order in (b'stall\\n', b'source 99999744\\n', b'echo\\n') * 10:
    s = c(); s.sendall(order); s.recv(10) if order[0] == 115 and order[1] == 111 else None
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()
print('done', flush=True); time.sleep(1)
"""
    run = Run(rig)
    run.go("/usr/bin/python3", "-c", CONNECT + script)
    run.until("inner", "R")
    assert run.process.stdout.readline() == b"done\n"
    time.sleep(0.5)
    assert len(list(Path(f"/proc/{inner_pid(run)}/fd").iterdir())) < 30
    assert run.wait() == 0
    run.close()


def inner_pid(run: Run) -> int:
    """Return PID 1 of the sandbox, as the host numbers it."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family(run.process.pid)}
    return next(pid for pid, line in lines.items() if b"\0inner\0" in line and b"bwrap" not in line)


def inner_pss_kib(run: Run) -> int:
    """Return the size of PID 1; 0 when we are not root and may not look."""
    return _kib(inner_pid(run), "Pss:") if os.getuid() == 0 else 0


def _kib(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def _ticks(pid: int) -> str:
    return " ".join(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
