"""The audit on a machine with a real systemd: who keeps the log, who can reach it, what happens when it fails."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from support.machines import Machine

POLICY = """\
schema = 1

[audit]
hashes = true

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
REACH = (
    "for f in /run/cloister/audit.sock /var/log/cloister/audit /var/lib/cloister/audit; do ls -d $f; done; "
    "ls /proc | grep -c '^[0-9]'; kill -9 KEEPER; echo x > /var/log/cloister/audit/HEAD; id -u"
)


@pytest.fixture
def installed(fresh_machine: Callable[..., Machine]) -> Machine:
    """A machine on which alice may start `sh` under systemd, and `ns` in her own sandbox."""
    machine = fresh_machine()
    machine.write("/etc/cloister/cloister.toml", POLICY)
    machine.run(["cloister", "setup", "--yes"])
    machine.run(["mkdir", "-p", PROJECT], user="alice")
    return machine


def run(machine: Machine, agent: str, script: str) -> Any:
    """Run a script as alice's agent."""
    return machine.run(
        ["cloister", "run", agent, "--", "sh", "-c", script], user="alice", cwd=PROJECT, check=False, timeout=60
    )


def events(machine: Machine) -> list[dict[str, Any]]:
    """Return all events of the log."""
    return [json.loads(line) for line in machine.run(["sh", "-c", f"cat {LOG}/*.jsonl"]).stdout.splitlines()]


def verified(machine: Machine, *words: str) -> dict[str, Any]:
    """Return what `cloister audit verify` says, as root."""
    done = machine.run(["cloister", "audit", "verify", "--system", "--json", *words], check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == report["good"]
    return report


def test_both_kinds_of_runs_are_on_record_and_no_agent_reaches_the_log(installed: Machine) -> None:
    """A unit of alice's and her sandbox stand in one verified log by their reporters; neither touches it."""
    keeper = installed.show("cloister-auditd.service", "MainPID")
    told = installed.run(["systemd-analyze", "security", "--no-pager", "cloister-auditd.service"], check=False).stdout
    assert float(re.findall(r"exposure level for \S+: ([0-9.]+)", told)[0]) <= 1.0
    for agent in ("sh", "ns"):
        done = run(installed, agent, REACH.replace("KEEPER", keeper))
        assert done.stdout.splitlines()[-1:] in [["1000"], ["1900000000"]], done.stderr
        assert "audit" not in done.stdout
    refused = run(installed, "nobody", "true")
    assert refused.returncode == 125
    assert installed.show("cloister-auditd.service", "MainPID") == keeper
    for agent in ("sh", "ns"):
        installed.wait_for(f"""grep -q '"run.ended","run":"[0-9a-z]*","agent":"{agent}"' {LOG}/*.jsonl""")
    installed.run(["nft", "insert", "rule", "inet", "cloister", "refuse", "accept"])  # somebody else's
    installed.wait_for(f"grep -q firewall.changed {LOG}/*.jsonl")
    found = events(installed)
    hashed = {one["agent"] for one in found if one["kind"] == "process.executed" and one["process"].get("hash")}
    assert hashed == {"sh", "ns"}, "digests of what was executed, of units and sandboxes"
    (changed,) = [one for one in found if one["kind"] == "firewall.changed"]
    assert (changed["source"], changed["reporter_uid"], changed["severity_id"]) == ("watchdog", 0, 4)
    told = [(one["reporter_uid"], one["id"]) for one in found if "reporter_uid" in one]
    assert len(told) == len(set(told)), "each report has an id of its own"
    unit, own = ([one for one in found if one.get("agent") == agent] for agent in ("sh", "ns"))
    assert {"hostd.request", "policy.changed", "run.started", "step.applied", "run.ended"} <= {e["kind"] for e in unit}
    assert {"run.started", "step.applied", "run.ended"} <= {event["kind"] for event in own}
    assert {(one["source"], one["user"]) for one in own if one["kind"] == "run.started"} == {("broker", "alice")}
    assert {one["reporter_uid"] for one in own if one["source"] == "broker"} == {1000}
    (request,) = [one for one in unit if one["kind"] == "hostd.request"]
    (begun,) = [one for one in unit if one["kind"] == "run.started"]
    assert (request["run"], request["user"], request["account"]) == (begun["run"], "alice", "cl-sh-alice")
    assert (request["policy"], request["details"]["workspace"]) == (begun["policy"], PROJECT)
    assert begun["source"] == "proxyd"
    report = verified(installed)
    assert report["good"], report["findings"]
    assert installed.run(["cat", f"{LOG}/HEAD"], user="alice", check=False).returncode != 0, "alice may not read it"
    installed.run(["sed", "-i", "0,/alice/s//mallo/", f"{LOG}/0000000000000001.jsonl"])
    assert not verified(installed)["good"]


def test_without_its_keeper_runs_end_and_none_begins_until_it_is_back(installed: Machine) -> None:
    """Killed, it is back before anybody ends; gone for good, runs end with 125 and new ones are refused."""
    living = [
        installed.popen(
            ["cloister", "run", agent, "--", "sh", "-c", "echo up; sleep 60"],
            user="alice",
            cwd=PROJECT,
            stdout=subprocess.PIPE,
        )
        for agent in ("sh", "ns")
    ]
    for one in living:
        assert one.stdout
        assert one.stdout.readline().strip() in {b"up", "up"}
    installed.run(["systemctl", "kill", "-s", "KILL", "cloister-auditd.service"])
    time.sleep(2)
    assert installed.show("cloister-auditd.service", "ActiveState") == "active"
    assert [one.poll() for one in living] == [None, None]
    installed.run(["systemctl", "mask", "--runtime", "--now", "cloister-auditd.socket", "cloister-auditd.service"])
    began = time.monotonic()
    assert [one.wait(40) for one in living] == [125, 125]
    assert time.monotonic() - began < 25
    for agent in ("sh", "ns"):
        refused = run(installed, agent, "true")
        assert (refused.returncode, "[audit-lost]" in refused.stderr) == (125, True), refused.stderr
    installed.run(["systemctl", "unmask", "--runtime", "cloister-auditd.socket", "cloister-auditd.service"])
    installed.run(["systemctl", "start", "cloister-auditd.socket", "cloister-auditd.service"])
    time.sleep(3)
    for agent in ("sh", "ns"):
        assert run(installed, agent, "exit 3").returncode == 3
    reasons = [event.get("reason") for event in events(installed) if event["kind"] == "run.ended"]
    assert reasons.count("audit-lost") == 2
    assert verified(installed)["good"]


@pytest.mark.slow
def test_uninstall_keeps_the_log_unless_told(installed: Machine) -> None:
    """The record stays and verifies with its keeper gone; --purge takes it as well."""
    run(installed, "sh", "true")
    installed.run(["cloister", "uninstall", "--yes"])
    assert not installed.path("/etc/systemd/system/cloister-auditd.service").exists()
    report = verified(installed, LOG)
    assert report["good"], report["findings"]
    assert report["ending"] == "closed"
    installed.run(["cloister", "setup", "--yes"])
    assert verified(installed)["first"] == 1
    assert verified(installed)["last"] > report["last"]
    installed.run(["cloister", "uninstall", "--yes", "--purge"])
    assert not installed.path("/var/log/cloister").exists()
