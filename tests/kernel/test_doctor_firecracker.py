"""The doctor says whether there is a Firecracker that a run could have: which one, whether it boots, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from cloister.host import vm_probe
from cloister.runs import doctor_vm, vm_monitor
from cloister.runs.doctor_vm import vm_findings
from cloister.runs.paths import locate
from cloister.runs.vm_accelerator import Guest

pytestmark = pytest.mark.kernel
HELLO = vm_probe.HELLO.decode()


class Asked(NamedTuple):
    """A host, and how the doctor is asked there."""

    home: Path

    def install(self, version: str, boot: str) -> Path:
        """Put a program there that says this version, and does this instead of booting."""
        program = self.home / "bin/firecracker"
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "{version}"; exit; }}\n{boot}\n')
        program.chmod(0o755)
        return program

    def told(self, *, quick: bool = False) -> tuple[str, str, str]:
        """Return state, meaning and remedy."""
        paths = locate({"XDG_RUNTIME_DIR": str(self.home)}, str(self.home), 0)
        environment = {"PATH": f"{self.home}/bin"}
        found = {each.name: each for each in vm_findings(paths, environment, quick=quick)}["microvm-firecracker"]
        assert found.needed_for == 'microvm.monitor = "firecracker"'
        return found.state, found.meaning, found.remedy


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A host with KVM and an image, as far as the doctor can tell, and no Firecracker yet."""
    monkeypatch.setattr(vm_monitor, "_PLACES", ())
    monkeypatch.setattr(vm_probe, "why_not_kvm", lambda: "")
    monkeypatch.setattr(doctor_vm, "_guests", lambda *_: iter([Guest("/nowhere/vmlinux", "/nowhere/cpio", "0")]))
    (tmp_path / "bin").mkdir(mode=0o755)
    return Asked(tmp_path)


def test_one_that_boots_is_named_with_its_version(host: Asked) -> None:
    """Path, version, and how soon a guest came up; asked to be quick, nothing is booted."""
    program = host.install("Firecracker v1.16.1", f"echo booted >>{host.home}/log; echo {HELLO}")

    assert host.told(quick=True) == ("degraded", f"{program} 1.16.1: nobody tried", "cloister doctor")
    assert not (host.home / "log").exists()
    state, meaning, _ = host.told()
    assert state == "ok"
    assert meaning.startswith(f"{program} 1.16.1: a guest came up in ")
    assert (host.home / "log").exists()


def test_one_that_boots_nothing_says_why(host: Asked) -> None:
    """Its last line is the reason."""
    program = host.install("Firecracker v1.16.1", "echo no such machine; exit 1")

    state, meaning, remedy = host.told()
    assert (state, meaning) == (
        "missing",
        f"{program} 1.16.1 boots no guest here: the monitor ended: no such machine",
    )
    assert remedy


def test_without_one_it_is_said_what_runs_instead(host: Asked) -> None:
    """Nothing installed: only the policy that names it is without it."""
    state, meaning, remedy = host.told()
    assert (state, meaning) == ("missing", "not installed; guests run in QEMU")
    assert "/usr/local/bin/firecracker" in remedy


def test_one_that_others_could_change_is_told_apart(host: Asked) -> None:
    """It is not used, and it is said which one and why."""
    program = host.install("Firecracker v1.16.1", "exit 1")
    program.chmod(0o777)

    state, meaning, _ = host.told()
    assert (state, meaning) == ("missing", f"{program} is not used: others than you and root could change it")
    program.chmod(0o755)
    assert host.told()[1] != meaning


@pytest.mark.parametrize(("version", "words"), [("Firecracker v1.7.0", "older than 1.8.0"), ("hello", "none")])
def test_a_version_that_cannot_be_used_is_told(host: Asked, version: str, words: str) -> None:
    """Too old, or no version at all: nothing of it is booted."""
    host.install(version, f"echo booted >>{host.home}/log; echo {HELLO}")

    state, meaning, remedy = host.told()
    assert (state, words in meaning) == ("missing", True)
    assert remedy
    assert not (host.home / "log").exists()


def test_without_kvm_it_is_not_tried(host: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """It emulates nothing: the reason is the host's."""
    monkeypatch.setattr(vm_probe, "why_not_kvm", lambda: "there is no /dev/kvm")
    program = host.install("Firecracker v1.16.1", f"echo booted >>{host.home}/log; echo {HELLO}")

    assert host.told()[:2] == ("missing", f"{program} 1.16.1 cannot run without KVM: there is no /dev/kvm")
    assert not (host.home / "log").exists()


def test_without_an_image_nobody_can_try(host: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to boot, and a line to type."""
    monkeypatch.setattr(doctor_vm, "_guests", lambda *_: iter(()))
    host.install("Firecracker v1.16.1", f"echo {HELLO}")

    assert host.told()[0] == "degraded"
    assert "cloister image build" in host.told()[2]
