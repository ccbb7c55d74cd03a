"""The main process of a gateway's unit: proves the walls, carries ports both ways, hands signals on, leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from shim_rig import TESTER, Rig, as_user, family, rig_of_test, seccomp_without_userns
from unit_rig import WALLS, filter_file, living

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

GATEWAY = """
import signal, socket, sys, os, subprocess
server = socket.create_server(('127.0.0.1', 18789))
signal.signal(signal.SIGHUP, lambda *_: print('reloaded', flush=True))
def end(*_):
    print('bye', flush=True)
    sys.exit(4)
signal.signal(signal.SIGTERM, end)
print('up', os.environ.get('LANG'), os.getcwd(), flush=True)
while True:
    client, _ = server.accept()
    data = client.recv(4096)
    out = socket.create_connection(('127.0.0.1', 3128), 5)
    out.sendall(b'echo\\n' + data)
    client.sendall(b'gateway ' + out.recv(4096))
    client.close()
"""


class Service:
    """`cloister-shim service` with bubblewrap in systemd's place."""

    def __init__(self, rig: Rig, *command: str, options: Sequence[str] = (), seccomp: bool = True) -> None:
        self.rig = rig
        self.socket = rig.work / "gateway.sock"
        filtered = filter_file(seccomp_without_userns())
        closed = ["--seccomp", str(filtered)] if seccomp else []
        words = ["service", "--egress", str(rig.relay.path), "--listen", "127.0.0.1:3128", "--probe-write", "/usr"]
        words += ["--publish", f"{self.socket}=127.0.0.1:18789", "--end", str(rig.work / "end.sock")]
        words += [*options, "--", *command]
        work = ["--bind", str(rig.work), str(rig.work), "--chdir", str(rig.work)]
        self.process = subprocess.Popen(
            [*WALLS, *work, *closed, "--cap-drop", "ALL", "--", str(rig.shim), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[filtered],
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}, **as_user(),
        )  # fmt: skip
        os.close(filtered)

    def ask(self, text: bytes) -> bytes:
        """Speak to the gateway from outside, through what it publishes."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(self.socket))
            client.sendall(text)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(4096), b""))

    def stop(self, number: int) -> None:
        """Send a signal to the main process."""
        os.kill(self.main(), number)

    def main(self) -> int:
        """Return the pid of the shim."""
        shim = os.fsencode(self.rig.shim)
        (pid,) = [pid for pid in family(self.process.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(shim)]
        return pid

    def result(self) -> tuple[int, bytes, bytes]:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, out, err


@pytest.fixture
def gateway(rig: Rig) -> Iterator[Service]:
    """A gateway that is up."""
    made = Service(rig, "/usr/bin/python3", "-c", GATEWAY)
    assert made.process.stdout.readline() == f"up C.UTF-8 {rig.work}\n".encode()
    yield made
    for pid in family(made.process.pid):
        os.kill(pid, signal.SIGKILL)
    made.process.communicate()


def test_a_gateway_is_reached_from_outside_and_reaches_the_relay(gateway: Service) -> None:
    """Its loopback port is a Unix socket outside, for owner and group; its way out is the relay."""
    for number in range(20):
        assert gateway.ask(b"%d" % number) == b"gateway %d" % number
    about = gateway.socket.stat()
    assert about.st_mode & 0o7777 == 0o660
    assert about.st_uid == (TESTER if os.getuid() == 0 else os.getuid())


def test_signals_of_systemd_reach_the_gateway_and_its_status_is_the_units(gateway: Service) -> None:
    """HUP reloads; TERM ends it, and it says with what status."""
    gateway.stop(signal.SIGHUP)
    assert gateway.process.stdout.readline() == b"reloaded\n"
    assert gateway.ask(b"still") == b"gateway still"
    gateway.stop(signal.SIGTERM)
    assert gateway.result()[:2] == (4, b"bye\n")


def test_who_asks_for_the_end_waits_for_it(gateway: Service) -> None:
    """The gateway gets TERM once and its time; the asker leaves with it, and finds nobody afterwards."""
    ask = [gateway.rig.shim, "end", gateway.rig.work / "end.sock"]
    assert (gateway.rig.work / "end.sock").stat().st_mode & 0o7777 == 0o660
    asking = [subprocess.Popen(ask, **as_user()) for _ in range(3)]
    assert gateway.result()[:2] == (4, b"bye\n")
    assert [one.wait(5) for one in asking] == [0, 0, 0]
    assert subprocess.run(ask, check=False, timeout=5, **as_user()).returncode == 0


def test_a_gateway_that_does_not_end_when_asked_is_ended_by_the_next_word(rig: Rig) -> None:
    """The asker waits as long as it takes; TERM, which systemd sends when the time is over, ends it at once."""
    service = Service(rig, "sh", "-c", "trap 'echo heard' TERM; echo up; while :; do sleep 0.05; done")
    assert service.process.stdout.readline() == b"up\n"
    asking = subprocess.Popen([rig.shim, "end", rig.work / "end.sock"], **as_user())
    assert service.process.stdout.readline() == b"heard\n"
    with pytest.raises(subprocess.TimeoutExpired):
        asking.wait(0.3)
    service.stop(signal.SIGTERM)
    assert service.result()[0] == 128 + signal.SIGTERM
    assert asking.wait(5) == 0


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 78", 78), ("kill -KILL $$", 137)])
def test_the_status_of_the_gateway_is_the_units(rig: Rig, script: str, code: int) -> None:
    """So that RestartPreventExitStatus= and Restart=on-failure mean what they say; 128+n for a signal."""
    assert Service(rig, "sh", "-c", script).result() == (code, b"", b"")


def test_what_the_gateway_left_behind_ends_with_it(rig: Rig) -> None:
    """Children in sessions of their own do not hold the port of the next start."""
    mark = f"left-{os.getpid()}"
    tool = rig.work / mark
    tool.write_text("#!/bin/sh\ntrap '' TERM HUP INT\nwhile :; do sleep 0.05; done\n")
    tool.chmod(0o755)
    script = f"setsid {tool} & setsid {tool} & sleep 0.2; exit 5"
    service = Service(rig, "sh", "-c", script)
    assert service.process.wait(10) == 5
    assert living(mark) == set()
    service.process.communicate()


def test_a_wall_that_does_not_stand_is_a_line_in_the_journal_and_125(rig: Rig) -> None:
    """Without a filter, with a writable system, or without its relay, nothing is started."""
    ran = rig.work / "ran"
    for how in ({"seccomp": False}, {"options": ["--probe-write", str(rig.work)]}):
        code, out, err = Service(rig, "touch", str(ran), **how).result()
        assert (code, out) == (125, b"")
        assert err.startswith(b"cloister: the sandbox of this service is not what was promised: ")
        assert err.endswith(b" [self-probe-failed]\n")
        assert err.count(b"\n") == 1
    rig.relay.path.rename(rig.relay.path.with_suffix(".gone"))
    assert b"egress=ENOENT" in Service(rig, "touch", str(ran)).result()[2]
    assert not ran.exists()
    rig.relay.path.with_suffix(".gone").rename(rig.relay.path)
    assert Service(rig, "touch", str(ran)).result()[0] == 0
    assert ran.exists()


def test_what_cannot_be_started_says_so(rig: Rig) -> None:
    """127 and 126 as a shell would, with a line; a wrong use is 125."""
    code, _, err = Service(rig, "/no/such/gateway").result()
    shown = b"cloister: cannot start /no/such/gateway (exec): No such file or directory [service-not-started]\n"
    assert (code, err) == (127, shown)
    assert Service(rig, "/etc/passwd").result()[0] == 126
    for words in (["--egress", "/x"], ["--egress", "/x", "--"], ["--egress", "/x", "--ctl", "3", "--", "true"]):
        ended = subprocess.run([rig.shim, "service", *words], capture_output=True, check=False, timeout=5)
        assert (ended.returncode, ended.stderr[-8:]) == (125, b"[usage]\n")
    ended = subprocess.run([rig.shim, "inner", "--ctl", "3", "--egress", "/x", "--", "true"], check=False, timeout=5)
    assert ended.returncode == 125


@pytest.mark.parametrize(
    "publish", ["x", "=127.0.0.1:1", "sock=127.0.0.1", "sock=127.0.0.1:0", "/no/such/dir/s=127.0.0.1:9"]
)
def test_a_port_that_cannot_be_published_ends_the_start(rig: Rig, publish: str) -> None:
    """A wrong word, or a place where no socket can be made: 125, and a line."""
    code, _, err = Service(rig, "true", options=["--publish", publish]).result()
    assert (code, b"[publish-failed]" in err) == (125, True)


def test_only_a_socket_is_replaced(rig: Rig) -> None:
    """What a killed predecessor left is taken away; a file at that place is not ours to remove."""
    place = rig.work / "gateway.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(place))
    os.chown(place, *([TESTER, TESTER] if os.getuid() == 0 else [-1, -1]))
    assert Service(rig, "true").result()[0] == 0
    place.unlink()
    place.write_text("precious")
    assert Service(rig, "true").result()[0] == 125
    assert place.read_text() == "precious"


def test_a_gateway_that_does_not_listen_yet_refuses_at_once(rig: Rig) -> None:
    """A client before the gateway is up gets an end, not a hang, and the next one is served."""
    late = GATEWAY.replace(
        "server = ", "print('early', flush=True); sys.stdin.read(); import time; time.sleep(0.4)\nserver = ", 1
    )
    service = Service(rig, "/usr/bin/python3", "-c", late)
    assert service.process.stdout.readline() == b"early\n"
    begun = time.monotonic()
    try:
        answer = service.ask(b"x")
    except ConnectionError:
        answer = b""
    assert answer == b""
    assert time.monotonic() - begun < 2
    assert service.process.stdout.readline().startswith(b"up")
    assert service.ask(b"now") == b"gateway now"
    service.stop(signal.SIGTERM)
    assert service.result()[0] == 4
