"""The system's log is sent by a unit of its own, which a receiver in the policy brings and takes along."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from support.cef_parser import parse as parse_cef
from support.machines import Machine
from support.syslog_parser import frames
from support.syslog_parser import parse as parse_syslog

POLICY = """\
schema = 1

[agents.sh]
isolation = "unit"
command = ["/bin/sh"]
environment_audit = false

[users.alice]
agents = ["sh"]
roots = ["~/src"]
"""
RECEIVER = """\
import socket
listener = socket.create_server(("127.0.0.1", 6514))
with open("/tmp/received", "ab", buffering=0) as file:
    while True:
        connection = listener.accept()[0]
        while data := connection.recv(65536):
            file.write(data)
"""
UNIT = "cloister-audit-export.service"
PROJECT = "/home/alice/src/p"


@pytest.fixture
def sending(fresh_machine: Callable[..., Machine]) -> Machine:
    """A machine whose policy names a receiver that is not there yet."""
    machine = fresh_machine()
    machine.write("/etc/cloister/cloister.toml", POLICY + '[audit]\nsyslog = "tcp://127.0.0.1:6514"\n')
    machine.run(["cloister", "setup", "--yes"], timeout=120)
    machine.run(["mkdir", "-p", PROJECT], user="alice")
    machine.write("/root/receiver.py", RECEIVER)
    return machine


def _kinds(machine: Machine) -> dict[int, str]:
    """Return number and kind of what arrived; a connection that was cut leaves half a frame at its end."""
    data = machine.run(["cat", "/tmp/received"], check=False, text=False).stdout
    found, rest = frames(data)
    assert rest == b""
    parsed = [parse_cef(parse_syslog(message)[3]) for message in found]
    return {int(pairs["externalId"]): header[4] for header, pairs in parsed}


def _wait(machine: Machine, kind: str, count: int) -> dict[int, str]:
    deadline = time.monotonic() + 40
    while list((found := _kinds(machine)).values()).count(kind) < count:
        assert time.monotonic() < deadline, (found, machine.run(["journalctl", "-u", UNIT, "-o", "cat"]).stdout)
        time.sleep(0.5)
    return found


@pytest.mark.parametrize(
    "suite", ["bookworm", pytest.param("trixie", marks=pytest.mark.slow)], indirect=True, scope="session"
)
def test_the_system_s_log_is_sent_by_a_user_who_can_only_read_it(sending: Machine) -> None:
    """What happened before the receiver came arrives too; the sender is killed, and nothing is missing.

    Its user reads the log, and can neither write it nor read its key; without a receiver there is no unit.
    """
    run = ["cloister", "run", "sh", "--", "sh", "-c", "true"]
    sending.run(run, user="alice", cwd=PROJECT, timeout=60)
    sending.run(["systemd-run", "--unit=receiver", "/opt/cloister/bin/python", "/root/receiver.py"])
    _wait(sending, "run.ended", 1)
    sending.run(["systemctl", "kill", "--signal=KILL", UNIT])
    sending.run(run, user="alice", cwd=PROJECT, timeout=60)
    found = _wait(sending, "run.ended", 2)
    assert sorted(found) == list(range(1, max(found) + 1))

    group = sending.run(["id", "-g", "cloister-audit"]).stdout.strip()
    as_sender = ["setpriv", "--reuid", "cloister-export", "--regid", "cloister-export", "--groups", group, "sh", "-c"]
    reads = sending.run([*as_sender, "cat /var/log/cloister/audit/*.jsonl | wc -l"]).stdout
    writes = sending.run(
        [*as_sender, "echo x >> /var/log/cloister/audit/HEAD; : > /var/log/cloister/audit/x"], check=False
    )
    key = sending.run([*as_sender, "ls /var/lib/cloister/audit/"], check=False)
    assert int(reads) >= max(found)
    assert writes.stderr.count("ermission denied") == 2
    assert "ermission denied" in key.stderr
    told = sending.run(["systemd-analyze", "security", "--no-pager", UNIT], check=False).stdout
    assert float(re.findall(r"exposure level for \S+: ([0-9.]+)", told)[0]) <= 2.0

    sending.write("/etc/cloister/cloister.toml", POLICY)
    sending.run(["cloister", "apply", "--yes"], timeout=60)
    assert sending.show(UNIT, "LoadState") == "not-found"
    assert sending.run(["systemctl", "is-active", UNIT], check=False).stdout.strip() == "inactive"
