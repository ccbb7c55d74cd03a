"""The daemons as they are installed: how much they are held back, and that they work so."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from support.machines import Machine

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


@pytest.fixture
def installed(fresh_machine: Callable[..., Machine]) -> Machine:
    """A machine on which alice may start `sh`."""
    machine = fresh_machine()
    machine.write("/etc/cloister/cloister.toml", POLICY)
    machine.run(["cloister", "setup", "--yes"])
    machine.run(["mkdir", "-p", "/home/alice/src/p"], user="alice")
    return machine


def exposure(machine: Machine, unit: str) -> float:
    """Return what `systemd-analyze security` says of a unit: 10 is an open door."""
    told = machine.run(["systemd-analyze", "security", "--no-pager", unit], check=False).stdout
    return float(re.findall(r"exposure level for \S+: ([0-9.]+)", told)[0])


def test_the_daemons_are_held_back_and_do_their_work(installed: Machine) -> None:
    """Hostd needs root's mounts and ids, and scores 4.0 or less; the broker 1.5 or less; a run goes through both."""
    assert exposure(installed, "cloister-hostd.service") <= 4.0
    assert exposure(installed, "cloister-proxyd.service") <= 1.5
    assert exposure(installed, "cron.service" if installed.path("/lib/systemd/system/cron.service").exists() else
                    "dbus.service") > 4.0, "the scale is a scale"  # fmt: skip
    done = installed.run(
        ["cloister", "run", "sh", "-c", "id -un; touch made; exit 7"],
        user="alice", cwd="/home/alice/src/p", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "cl-sh-alice\n"), done.stderr
    assert installed.path("/home/alice/src/p/made").stat().st_uid == 1000


def test_the_broker_is_started_when_it_answers(installed: Machine) -> None:
    """Its unit is active only once it has said so, and a run right after a restart finds it."""
    installed.run(["systemctl", "restart", "cloister-proxyd.service"])
    assert installed.show("cloister-proxyd.service", "Type") == "notify"
    assert installed.show("cloister-proxyd.service", "ActiveState") == "active"
    done = installed.run(["cloister", "run", "sh", "-c", "true"], user="alice", cwd="/home/alice/src/p", check=False)
    assert done.returncode == 0, done.stderr


def test_a_broker_that_dies_at_each_start_keeps_its_socket(installed: Machine) -> None:
    """However often it failed, the next request starts it again: systemd does not give its socket up."""
    drop_in = "/run/systemd/system/cloister-proxyd.service.d/broken.conf"
    installed.run(["mkdir", "-p", drop_in.rpartition("/")[0]])
    installed.write(drop_in, "[Service]\nExecStart=\nExecStart=/bin/sh -c 'sleep 0.2; exit 1'\n")
    installed.run(["systemctl", "stop", "cloister-proxyd.service"])
    installed.run(["systemctl", "daemon-reload"])
    for _ in range(8):  # systemd gives up after five in ten seconds
        assert installed.run(["systemctl", "start", "cloister-proxyd.service"], check=False).returncode != 0
    assert installed.show("cloister-proxyd.socket", "ActiveState") == "active"
    installed.run(["rm", drop_in])
    installed.run(["systemctl", "daemon-reload"])
    done = installed.run(["cloister", "run", "sh", "-c", "true"], user="alice", cwd="/home/alice/src/p", check=False)
    assert done.returncode == 0, done.stderr


def test_the_broker_of_the_system_reads_keys_of_roots_that_it_could_not_open(installed: Machine) -> None:
    """A key that only root may read reaches the broker, and its user cannot read it in any other way."""
    installed.write("/etc/cloister/keys/x.key", "made-up-key\n", 0o600)
    installed.write(
        "/etc/cloister/cloister.toml",
        POLICY + '[providers.x]\nkey = "file:/etc/cloister/keys/x.key"\n[agents.sh.llm]\nproviders = ["x"]\n',
    )
    installed.run(["cloister", "apply", "--yes"])
    installed.run(["systemctl", "start", "cloister-proxyd.service"])
    pid = installed.show("cloister-proxyd.service", "MainPID")
    code = f"""
import os, sys
root = "/proc/{pid}/root/run/credentials/cloister-proxyd.service"
print([open(root + "/" + name).read() for name in os.listdir(root)])
"""
    assert "made-up-key" in installed.python(code).stdout
    refused = installed.run(["setpriv", "--reuid=cloister-proxy", "--clear-groups", "cat", "/etc/cloister/keys/x.key"],
                            check=False)  # fmt: skip
    assert "Permission denied" in refused.stderr
    installed.run(["sh", "-c", "sleep 1.1; echo other-key > /etc/cloister/keys/x.key"])
    shown = installed.run(["cloister", "apply", "--yes"]).stdout
    assert "restart cloister-proxyd.service: /etc/cloister/keys/x.key is newer than it" in shown
    assert installed.show("cloister-proxyd.service", "ActiveState") == "active"
    assert (
        "other-key" in installed.python(code.replace(pid, installed.show("cloister-proxyd.service", "MainPID"))).stdout
    )
