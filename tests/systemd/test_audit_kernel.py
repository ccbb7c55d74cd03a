"""Kernel events on a machine with a real systemd: units by their cgroup, sandboxes by their pid namespace."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from support.machines import Machine

POLICY = """\
schema = 1

[agents.sh]
isolation = "unit"
command = ["/bin/sh"]
environment_audit = false

[agents.ns]
preset = "shell"
environment_audit = false
hardening = { nested = true } # in these machines bubblewrap may not write /proc/sys

[users.alice]
agents = ["sh", "ns"]
roots = ["~/src"]
"""
PROJECT = "/home/alice/src/p"
LOG = "/var/log/cloister/audit"


@pytest.fixture
def installed(fresh_machine: Callable[..., Machine]) -> Machine:
    """A machine on which alice may start `sh` under systemd, and `ns` in her own sandbox."""
    machine = fresh_machine()
    machine.write("/etc/cloister/cloister.toml", POLICY)
    machine.run(["cloister", "setup", "--yes"])
    machine.run(["mkdir", "-p", PROJECT], user="alice")
    return machine


def events(machine: Machine) -> list[dict[str, Any]]:
    """Return all events of the log."""
    return [json.loads(line) for line in machine.run(["sh", "-c", f"cat {LOG}/*.jsonl"]).stdout.splitlines()]


def test_the_first_instruction_of_both_kinds_of_runs_is_on_record(installed: Machine) -> None:
    """Nothing of an agent runs unseen: its own first launch is an event, and so is what it does with files."""
    told = installed.run(["systemd-analyze", "security", "--no-pager", "cloister-sensor.service"], check=False).stdout
    assert float(re.findall(r"exposure level for \S+: ([0-9.]+)", told)[0]) <= 3.0
    for agent in ("sh", "ns"):
        command = ["cloister", "run", agent, "--", "sh", "-c", "echo x > made; /bin/true first"]
        done = installed.run(command, user="alice", cwd=PROJECT, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        installed.wait_for(f"""grep '"agent":"{agent}"' {LOG}/*.jsonl | grep -q kernel.counted""")
    found = events(installed)
    tier = next(one for one in found if one["kind"] == "log.tier" and "tier_process" in one["details"])
    assert tier["details"]["tier_process"] == "tracepoint"
    for agent in ("sh", "ns"):
        own = [one for one in found if one.get("agent") == agent]
        begun = next(one for one in own if one["kind"] == "run.started")
        launched = [one for one in own if one["kind"] == "process.executed"]
        assert {(one["run"], one["user"]) for one in launched} == {(begun["run"], "alice")}
        words = [one["process"]["cmd_line"] for one in launched]
        assert words[0][-2:] == ["-c", "echo x > made; /bin/true first"], words
        assert ["/bin/true", "first"] in words
        assert any(one["file"]["path"].endswith("/made") for one in own if one["kind"] == "file.opened")
    report = installed.run(["cloister", "audit", "verify", "--system", "--json"], check=False)
    assert json.loads(report.stdout)["good"], report.stdout


def test_a_killed_sensor_watches_the_same_runs_again_and_detections_are_made(installed: Machine) -> None:
    """The watches of a unit and of a sandbox outlive it; what they read afterwards is seen, and found by a rule."""
    script = "echo up; until test -e go; do sleep 0.2; done; cat .netrc; /bin/true again"
    installed.run(["touch", f"{PROJECT}/.netrc"], user="alice")
    living = [
        installed.popen(["cloister", "run", agent, "--", "sh", "-c", script], user="alice", cwd=PROJECT,
                        stdout=subprocess.PIPE)
        for agent in ("sh", "ns")
    ]  # fmt: skip
    for one in living:
        assert one.stdout
        assert one.stdout.readline().strip() in {b"up", "up"}
    kept = installed.show("cloister-sensor.service", "NFileDescriptorStore")
    installed.run(["systemctl", "kill", "-s", "KILL", "cloister-sensor.service"])
    for agent in ("sh", "ns"):
        installed.wait_for(f"""grep 'sensor-restarted' {LOG}/*.jsonl | grep -q '"agent":"{agent}"'""", timeout=30)
    installed.run(["touch", f"{PROJECT}/go"], user="alice")
    assert [one.wait(40) for one in living] == [0, 0]
    for agent in ("sh", "ns"):
        installed.wait_for(f"""grep '"agent":"{agent}"' {LOG}/*.jsonl | grep -q kernel.counted""")
    found = events(installed)
    assert kept == "5"  # a memfd and a cgroup; a memfd, a namespace and the connection that asked
    assert installed.show("cloister-sensor.service", "NFileDescriptorStore") == "0"
    for agent in ("sh", "ns"):
        own = [one for one in found if one.get("agent") == agent]
        run = next(one["run"] for one in own if one["kind"] == "run.started")
        words = [one["process"]["cmd_line"] for one in own if one["kind"] == "process.executed"]
        assert ["/bin/true", "again"] in words
        matched = [one for one in own if one["kind"] == "detection.matched" and one["rule"] == "secret-file-read"]
        assert [(one["run"], one["user"], one["source"]) for one in matched] == [(run, "alice", "auditd")]
        assert matched[0]["file"]["path"].endswith(".netrc")
    report = installed.run(["cloister", "audit", "verify", "--system", "--json"], check=False)
    assert json.loads(report.stdout)["good"], report.stdout


def test_without_a_sensor_the_log_says_so(installed: Machine) -> None:
    """Stopped, its absence stands in the log, runs go on, and the receipt of a unit says what is missing."""
    installed.wait_for(f"""grep -q '"tier_process":"tracepoint"' {LOG}/*.jsonl""")
    installed.run(["systemctl", "stop", "cloister-sensor.service"])
    installed.wait_for(f"""grep -q '"log.tier".*sensor is gone' {LOG}/*.jsonl""")
    done = installed.run(["cloister", "run", "sh", "--", "true"], user="alice", cwd=PROJECT, check=False)
    assert done.returncode == 0
    receipt = installed.run(["cloister", "receipt", "last", "--json"], user="alice").stdout
    assert "no kernel events of this run" in receipt
    installed.run(["systemctl", "start", "cloister-sensor.service"])
    installed.wait_for(f"""tail -n 40 {LOG}/*.jsonl | grep -q '"tier_process":"tracepoint"'""")
