"""The packet filter as `cloister setup`, `apply` and `uninstall` bring and take it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cloister.plan.firewall import FIREWALL_UNIT, WATCHDOG_UNIT
from support import lan
from support.lan import LAN4, LAN6, METADATA, PUBLIC
from support.machines import Machine

Make = Callable[..., Machine]

POLICY_FILE = "/etc/cloister/cloister.toml"
POLICY = """\
schema = 1

[agents.pi]
isolation = "unit"
command = ["/usr/bin/true"]

[agents.web]
isolation = "unit"
command = ["/usr/bin/true"]

[agents.web.egress]
mode = "internet"
private = ["192.168.77.9/32"]
deny = ["93.184.216.34:25"]

[agents.web.unit]
firewall = ["tcp dport 22 counter reject with tcp reset"]

[users.alice]
agents = ["pi", "web"]
roots = ["~/src"]
"""
PROBE = ["/usr/bin/python3", "/srv/tests/support/net_probe.py"]
INSIDE = [f"tcp:{each}:80" for each in (LAN4[0], LAN6[0], METADATA[0])]
NAS, WEB = "tcp:192.168.77.9:80", [f"tcp:{each}:80" for each in PUBLIC]
CLOSED = [f"tcp:{PUBLIC[0]}:22", f"tcp:{PUBLIC[1]}:22", f"tcp:{PUBLIC[0]}:25"]


def said(host: Machine, name: str, words: list[str]) -> set[str]:
    """Return what came of these targets, as an account."""
    uid = host.run(["id", "-u", name]).stdout.strip()
    done = host.run(["setpriv", f"--reuid={uid}", "--clear-groups", *PROBE, *words])
    return {outcome for outcome, _ in json.loads(done.stdout).values()}


def check(host: Machine) -> None:
    """Hold every account against the policy above."""
    assert said(host, "cl-pi-alice", [*INSIDE, NAS, *WEB, *CLOSED]) == {"ECONNREFUSED"}
    assert said(host, "cl-web-alice", [*INSIDE, *CLOSED]) == {"ECONNREFUSED"}
    assert said(host, "cl-web-alice", [NAS, *WEB]) == {"open"}
    assert said(host, "alice", [*INSIDE, NAS, *WEB, *CLOSED]) == {"open"}
    for unit in (FIREWALL_UNIT, WATCHDOG_UNIT):
        assert host.show(unit, "ActiveState") == "active"


@pytest.fixture
def host(fresh_machine: Make) -> Machine:
    """A machine on which the policy above is installed, with a network around it."""
    machine = fresh_machine()
    machine.write(POLICY_FILE, POLICY)
    machine.run(["cloister", "setup", "--yes"])
    lan.join(machine)
    return machine


def test_setup_apply_reboot_and_uninstall(host: Machine) -> None:
    """What the policy says of packets holds from the first setup on, after a reboot, and until it is uninstalled."""
    check(host)

    wider = POLICY.replace("tcp dport 22 counter reject with tcp reset", "tcp dport 26 drop")
    host.write(POLICY_FILE, wider)
    shown = host.run(["cloister", "apply", "--dry-run"]).stdout
    assert "tcp dport 26 drop" in shown
    check(host)
    host.run(["cloister", "apply", "--yes"])
    assert said(host, "cl-web-alice", [f"tcp:{PUBLIC[0]}:22"]) == {"open"}
    host.write(POLICY_FILE, POLICY)
    host.run(["cloister", "apply", "--yes"])
    check(host)
    assert "stopping what shares" not in host.journal(WATCHDOG_UNIT), "our own changes are no alarm"

    host.reboot()
    lan.join(host)
    check(host)

    host.run(["cloister", "uninstall", "--yes"])
    assert "cloister" not in host.run(["nft", "list", "tables"]).stdout
    assert not host.path("/var/lib/cloister/firewall.nft").exists()
    assert not host.run(
        ["systemctl", "list-unit-files", "--no-legend", FIREWALL_UNIT, WATCHDOG_UNIT], check=False
    ).stdout


def test_a_statement_that_is_none_changes_nothing(host: Machine) -> None:
    """One that opens, breaks out, or that nft does not understand refuses the whole policy: the old one holds."""
    place = ".agents.web.unit.firewall[0]"
    for wrong, where in (
        ("tcp dport 22 accept", place),
        ("drop } ; flush ruleset", place),
        ("tcp dport tcp drop", "nft does not take"),
    ):
        host.write(POLICY_FILE, POLICY.replace("tcp dport 22 counter reject with tcp reset", wrong))
        done = host.run(["cloister", "apply", "--yes"], check=False)

        assert done.returncode
        assert where in done.stderr
        check(host)
