"""What a gateway is as a service, with a small program in OpenClaw's place: ends, restarts, ports, reboots."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from support.machines import PYTHON, TESTS, Machine

PORT = 18801
UNIT, SOCKET = "cloister-service-gate.service", "cloister-port-gate.socket"
PROXYD = "cloister-proxyd.service"
SECRET = "4455:made-up_channel-secret"  # made up
GATE = """#!/usr/bin/python3
import http.server, signal, subprocess, sys, time
from urllib.parse import unquote
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        word, _, script = self.path.partition("?")
        body = subprocess.run(["/bin/sh", "-c", unquote(script)], capture_output=True).stdout if script else b"fine"
        self.send_response(200 if word in ("/healthz", "/sh") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        print("asked", self.path.partition("?")[0], flush=True)
def end(*_):
    time.sleep(0.1)
    print("bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.ThreadingHTTPServer(("127.0.0.1", 18801), Handler).serve_forever()
"""
FAR = """
import sys
from pathlib import Path
from support.secure_server import Answer, SecureServer, TestAuthority
folder = Path(sys.argv[1])
log = open(folder / "log", "w", buffering=1)
def answer(sent):
    print(sent.path, file=log)
    return Answer(body=sent.path.encode())
with SecureServer(TestAuthority(folder).context("host.cloister.internal"), answer) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""
POLICY = """\
schema = 1

[agents.gate]
preset = "shell"
isolation = "unit"
command = ["/opt/gate/gate"]

[agents.gate.egress]
allow = [{allow}]

[services.gate]
agent = "gate"
enable = true
port = 18801
{keys}

[services.gate.secrets.bot]
secret = "file:/etc/cloister/keys/bot"
inject = {{ host = "host.cloister.internal", port = {far}, scheme = "path", value = "bot{{secret}}" }}
mask = true
"""
MORE = """
[services.gate.secrets.later]
secret = "file:/etc/cloister/keys/bot"
inject = {{ host = "host.cloister.internal", port = {far}, scheme = "bearer" }}
"""


class Gate:
    """A machine with that gateway, and a host that it may be allowed to speak to."""

    def __init__(self, machine: Machine) -> None:
        """Install it."""
        self.machine = machine
        machine.run(["mkdir", "-p", "/srv/far"])
        self._far = machine.popen(
            [PYTHON, "-c", FAR, "/srv/far"], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert self._far.stdout
        self.port = int(self._far.stdout.readline())
        self.allowed = f'"host.cloister.internal:{self.port}"'
        machine.write("/opt/gate/gate", GATE, mode=0o755)
        machine.write("/etc/cloister/keys/bot", SECRET + "\n", mode=0o600)
        trusting = "[Service]\nEnvironment=SSL_CERT_FILE=/etc/ssl/of-the-test.pem\n"
        machine.write(f"/etc/systemd/system/{PROXYD}.d/test.conf", trusting)
        machine.run(["cp", "/srv/far/authority.pem", "/etc/ssl/of-the-test.pem"])
        self.declare()

    def declare(self, keys: str = 'ready = "/healthz"', allow: str = "", more: str = "") -> None:
        """Write the policy and put it in force."""
        self.write(keys, allow, more)
        self.machine.run(["cloister", "setup", "--yes"], timeout=60)

    def write(self, keys: str = 'ready = "/healthz"', allow: str = "", more: str = "") -> None:
        """Write the policy."""
        text = (POLICY + more).format(keys=keys, allow=allow, far=self.port)
        self.machine.write("/etc/cloister/cloister.toml", text)

    def cloister(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run root's `cloister`, whatever comes of it."""
        return self.machine.run(["cloister", *words], check=False, timeout=60)

    def inside(self, script: str) -> str:
        """Return what a shell script prints that the gateway runs as a tool of its own."""
        command = ["curl", "-s", "-m", "20", f"http://127.0.0.1:{PORT}/sh?{quote(script, safe='')}"]
        return str(self.machine.run(command, check=False).stdout)

    def fetch(self, path: str = "/x", *more: str) -> str:
        """Return what it gets from the host outside."""
        return self.inside(f"curl -sS {' '.join(more)} https://host.cloister.internal:{self.port}{path} 2>&1")

    def reaches(self, wanted: bool, limit_s: float = 25) -> None:
        """Wait until it gets what it asks for outside, or does not."""
        until = time.monotonic() + limit_s
        while ("curl:" not in (said := self.fetch()) and "403" not in said and "/x" in said) != wanted:
            assert time.monotonic() < until, said
            time.sleep(0.3)

    def status(self) -> dict[str, Any]:
        """Return the gateway's line of `cloister status`."""
        (line,) = json.loads(self.cloister("status", "--json").stdout)["services"]
        return dict(line)

    def close(self) -> None:
        """End the host outside."""
        self._far.kill()
        self._far.wait()


@pytest.fixture(scope="module")
def gate(suite: str, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """The gateway, ready."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"gate-{suite}")) as machine:
        made = Gate(machine)
        done = made.cloister("up", "gate")
        assert done.stdout == f"gate runs on 127.0.0.1:{PORT}, and answers\n", done.stderr + machine.journal(UNIT)
        yield made
        made.close()


def test_a_gateway_ends_in_its_own_time(gate: Gate) -> None:
    """Each stop is TERM and its own end; systemd 257 alone would kill it at once in one of three (PrivatePIDs=)."""
    machine = gate.machine
    times = 10 if machine.version >= 257 else 3  # where it went wrong
    for _ in range(times):
        assert gate.cloister("down", "gate").returncode == 0
        assert machine.show(UNIT, "ActiveState") == "inactive", machine.journal(UNIT)[-2000:]
        assert gate.cloister("up", "gate").returncode == 0
    assert machine.journal(UNIT).count("bye") == times


def test_a_restart_keeps_the_port(gate: Gate) -> None:
    """Another process, and the same socket: nobody else could have taken the port in between."""
    machine = gate.machine
    before = machine.show(UNIT, "MainPID"), machine.show(SOCKET, "ActiveEnterTimestampMonotonic")
    assert gate.cloister("restart", "gate").returncode == 0
    assert machine.show(UNIT, "MainPID") not in {"0", before[0]}
    assert machine.show(SOCKET, "ActiveEnterTimestampMonotonic") == before[1]


def test_readiness_is_what_was_declared(gate: Gate) -> None:
    """`ready` is asked; a wrong answer is `no`; without it nobody knows, and that is said, also in JSON."""
    assert json.loads(gate.cloister("up", "gate", "--json").stdout)[0]["ready"] is True
    gate.write('ready = "/nothing"')
    asked = json.loads(gate.cloister("status", "--ready", "--json").stdout)["services"][0]["ready"]
    assert asked == "answers 404"
    gate.write("")
    done = gate.cloister("up", "gate")
    assert (done.returncode, "whether it is ready is unknown" in done.stdout) == (0, True), done
    line = json.loads(gate.cloister("up", "gate", "--json").stdout)[0]
    assert (line["ready"], line["why"][:7]) == (None, "unknown")
    gate.write()


def test_logs_are_its_journal(gate: Gate) -> None:
    """`cloister logs` shows what it printed, `-f` what it prints next; who may not read the journal sees none."""
    gate.inside("true")
    assert "asked /sh" in gate.cloister("logs", "gate").stdout
    following = gate.machine.popen(
        ["cloister", "logs", "-f", "gate"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    assert following.stdout
    gate.machine.run(["curl", "-s", f"http://127.0.0.1:{PORT}/of-this-test"])
    assert any("asked /of-this-test" in line for line in iter(following.stdout.readline, ""))
    following.kill()
    following.wait()
    denied = gate.machine.run(["cloister", "logs", "gate"], user="alice", check=False)
    assert "asked" not in denied.stdout


def test_a_port_that_is_taken_is_said(gate: Gate) -> None:
    """Before anything is changed where `apply` would take it, by name where `up` does; the gateway is not restarted."""
    machine = gate.machine
    assert gate.status()["port_held"] is True
    gate.cloister("down", "gate")
    machine.run(["systemctl", "stop", SOCKET])
    held = f"import socket, time; s = socket.create_server(('127.0.0.1', {PORT})); print(flush=True); time.sleep(60)"
    other = machine.popen(["python3", "-c", held], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert other.stdout
    other.stdout.readline()
    refused = gate.cloister("up", "gate")
    assert (refused.returncode, "[port-taken]" in refused.stderr) == (71, True), refused
    assert f"sport = :{PORT}" in refused.stderr
    before = machine.show(UNIT, "NRestarts")
    assert gate.status()["port_held"] is False
    applied = gate.cloister("apply", "--yes")
    assert "another program has port 18801 of this host" in applied.stderr, applied
    assert machine.show(UNIT, "NRestarts") == before
    other.kill()
    other.wait()
    machine.wait_for(f"! ss -ltn | grep -q :{PORT}")
    done = gate.cloister("up", "gate")
    assert (done.returncode, gate.status()["port_held"]) == (0, True), done.stderr


def test_a_living_gateway_obeys_a_new_policy(gate: Gate) -> None:
    """`cloister apply` widens and narrows what it reaches, and the process stays the same."""
    before = gate.machine.show(UNIT, "MainPID")
    assert "403" in gate.fetch()
    gate.declare(allow=gate.allowed)
    gate.machine.wait_for(f"curl -s http://127.0.0.1:{PORT}/healthz")
    until = time.monotonic() + 10
    while "/x" not in (said := gate.fetch()) or "403" in said:
        assert time.monotonic() < until, said
    gate.declare()
    until = time.monotonic() + 10
    while "403" not in gate.fetch():
        assert time.monotonic() < until
    gate.machine.run(["systemctl", "kill", "--signal=HUP", PROXYD])
    assert "403" in gate.fetch()
    assert gate.machine.show(UNIT, "MainPID") == before


def test_the_secret_of_a_channel_is_never_inside(gate: Gate) -> None:
    """Its host gets it in the path; inside are a placeholder and a masked echo; elsewhere it is refused."""
    gate.declare(allow=gate.allowed)
    until = time.monotonic() + 10
    while "403" in gate.fetch():
        assert time.monotonic() < until
    said = gate.fetch("/bot$(cat $CLOISTER_SECRETS/secret-bot)/getMe")
    assert gate.machine.read("/srv/far/log").splitlines()[-1] == f"/bot{SECRET}/getMe"
    assert "getMe" in said
    assert SECRET not in said
    assert "placeholder" in gate.fetch("/x?token=$(cat $CLOISTER_SECRETS/secret-bot)")
    assert gate.inside("cat $CLOISTER_SECRETS/secret-bot").startswith("cloister-secret-bot-")
    assert gate.inside(f"grep -rIls {SECRET} /run /etc /tmp /var $HOME; cat /proc/[0-9]*/environ").find(SECRET) == -1
    assert SECRET not in gate.machine.run(["sh", "-c", "cat /var/lib/cloister/proxy/runs/*/*.jsonl"]).stdout
    gate.declare()


def test_a_secret_that_is_declared_later_has_a_placeholder_too(gate: Gate) -> None:
    """The broker lives on, makes it, and the gateway is started with it; undeclared it is gone."""
    for more, there in ((MORE, "secret-bot secret-later"), ("", "secret-bot")):
        gate.declare(more=more)
        assert gate.cloister("up", "gate").returncode == 0, gate.machine.journal(UNIT)[-2000:]
        assert " ".join(gate.inside("ls $CLOISTER_SECRETS").split()) == there
        assert gate.inside("cat $CLOISTER_SECRETS/secret-later").startswith("cloister-secret-later-") == bool(more)


def test_a_secret_that_is_lost_stops_its_gateway_alone(gate: Gate) -> None:
    """The system's broker starts without it; the gateway does not, and the journal says why; with it, it does."""
    machine, key = gate.machine, "/etc/cloister/keys/bot"
    machine.run(["mv", key, f"{key}.gone"])
    try:
        machine.run(["systemctl", "restart", PROXYD])
        assert machine.show(PROXYD, "ActiveState") == "active"
        assert "gateway gate: a secret cannot be had: it is empty" in machine.journal(PROXYD)
        assert machine.show(UNIT, "MainPID") == "0"
        assert not machine.path("/run/cloister/proxy/services/gate/secret-bot").exists()
    finally:
        machine.run(["mv", f"{key}.gone", key])
        machine.run(["systemctl", "restart", PROXYD])
    done = gate.cloister("up", "gate")
    assert done.returncode == 0, done.stderr + machine.journal(PROXYD)[-2000:]


def test_a_killed_proxy_takes_the_gateway_along_and_brings_it_back(gate: Gate) -> None:
    """Without its proxy it reaches nothing; systemd starts both anew, and the new one obeys the policy."""
    machine = gate.machine
    before = machine.show(UNIT, "MainPID")
    machine.run(["systemctl", "kill", "--signal=KILL", PROXYD])
    assert "curl:" in gate.fetch() or machine.show(UNIT, "MainPID") != before
    machine.wait_for(f"test $(systemctl show --value -p MainPID {UNIT}) -ne {before}", timeout=20)
    assert gate.cloister("up", "gate").returncode == 0
    assert machine.show(UNIT, "MainPID") not in {"0", before}
    assert "403" in gate.fetch()


def test_a_gateway_that_is_not_recorded_reaches_nothing(gate: Gate) -> None:
    """Without the keeper of the log it is cut off from its proxy, and lives; with it, a restart gives it back."""
    machine, units = gate.machine, ["cloister-auditd.socket", "cloister-auditd.service"]
    gate.declare(allow=gate.allowed)
    gate.reaches(True)
    machine.run(["systemctl", "mask", "--runtime", "--now", *units])
    try:
        gate.reaches(False)
        assert machine.show(UNIT, "ActiveState") == "active"
        assert "served when what they do can be recorded again" in machine.journal(PROXYD)
    finally:
        machine.run(["systemctl", "unmask", "--runtime", *units])
        machine.run(["systemctl", "start", *units])
    machine.wait_for("test -S /run/cloister/proxy/services/gate/box/egress.sock", timeout=20)
    assert gate.cloister("restart", "gate").returncode == 0
    gate.reaches(True)
    ends = machine.run(["sh", "-c", "grep -h run.ended /var/log/cloister/audit/*.jsonl | grep -c audit-lost"])
    assert int(ends.stdout) == 1
    gate.declare()


def test_a_gateway_is_back_after_a_reboot(gate: Gate) -> None:
    """Last: by a cut of the power and in order; nobody types anything."""
    for again in (gate.machine.cut, gate.machine.reboot):  # a shutdown would wait for what tests have started
        again()
        gate.machine.wait_for(f"curl -sf http://127.0.0.1:{PORT}/healthz", timeout=20)
        assert gate.status()["state"] == "active"
        assert gate.machine.run(["cloister", "apply", "--dry-run", "--json"]).stdout.find('"steps": []') >= 0
