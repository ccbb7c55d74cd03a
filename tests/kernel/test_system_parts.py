"""What an installation takes from its host: who makes users, and who hears that the system's broker is ready."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cloister.host import programs, system_probe
from cloister.plan.facts import Program
from cloister.services.proxyd import notify_ready

pytestmark = pytest.mark.kernel


def test_users_are_made_by_sysusers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with useradd only is told so at once (`no-sysusers`), not in the middle of the installation."""
    there = {"useradd": "/usr/sbin/useradd"}
    monkeypatch.setattr(programs, "find", lambda name, _: Program(path=there.get(name, "")))
    assert system_probe.users_program() == ""
    there["systemd-sysusers"] = "/usr/bin/systemd-sysusers"
    assert system_probe.users_program() == "/usr/bin/systemd-sysusers"


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_hears_once_that_the_broker_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, abstract: bool
) -> None:
    """READY=1 goes to NOTIFY_SOCKET, a path or an abstract name; no child inherits the variable."""
    name = f"@cloister-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify_ready()
        assert manager.recv(64) == b"READY=1"
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize("value", ["", "relative", "/nowhere/at/all"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Started by hand, or with a manager that is gone, the broker works as well."""
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify_ready()
