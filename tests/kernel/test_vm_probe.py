"""Whether KVM boots a guest is found out by booting one, within bounds, once; programs that play a monitor stand in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cloister.host import vm_probe
from cloister.runs import vm_accelerator
from cloister.runs.vm_accelerator import Guest, accelerator

pytestmark = pytest.mark.kernel

HELLO = vm_probe.HELLO.decode()


def monitor(folder: Path, script: str) -> str:
    """Write a program that notes each start, and does this."""
    path = folder / "monitor"
    path.write_text(f"#!/bin/bash\necho started >>{folder}/starts\n{script}\n")
    path.chmod(0o755)
    return str(path)


def starts(folder: Path) -> int:
    """Count how often it was started."""
    noted = folder / "starts"
    return len(noted.read_text().splitlines()) if noted.exists() else 0


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    """What would be booted."""
    return Guest(str(tmp_path / "vmlinux"), str(tmp_path / "initramfs.cpio"), "0" * 64)


@pytest.fixture
def kvm_is_worth_a_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that could, and a device that opens: what this host has proves nothing here."""
    monkeypatch.setattr(vm_probe, "why_not_kvm", lambda: "")


def test_a_guest_that_says_hello_is_heard(tmp_path: Path) -> None:
    """The word counts wherever it stands, and the monitor does not outlive the answer."""
    started = time.monotonic()
    heard = vm_probe.hear([monitor(tmp_path, f"echo noise; echo {HELLO}; exec sleep 30")])
    assert 0 < heard.seconds < 10
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec sleep 30", "said nothing"),
        ("echo a kernel begins; exec sleep 30", "did not come up"),
        ("echo cannot set up KVM; exit 1", "the monitor ended: cannot set up KVM"),
        ("exit 0", "without a word"),
        (r"printf 'bad\033[2J'; exit 1", "bad?[2J"),
    ],
)
def test_a_monitor_that_boots_nothing_is_not_waited_for(tmp_path: Path, script: str, why: str) -> None:
    """Silence, a boot that hangs, and a monitor that ends are each told apart, in bounded time and printable words."""
    started = time.monotonic()
    heard = vm_probe.hear([monitor(tmp_path, script)], first_word_s=0.4, bound_s=0.8)
    assert heard.seconds == 0
    assert why in heard.why
    assert time.monotonic() - started < 10


def test_a_monitor_that_talks_without_end_is_cut_off(tmp_path: Path) -> None:
    """What it prints is bounded."""
    heard = vm_probe.hear([monitor(tmp_path, "exec yes")])
    assert heard.seconds == 0


def test_no_monitor_is_no_answer(tmp_path: Path) -> None:
    """A program that cannot be started is said to be so."""
    assert "cannot be started" in vm_probe.hear([str(tmp_path / "none")]).why


@pytest.mark.usefixtures("kvm_is_worth_a_try")
def test_kvm_is_believed_when_it_has_booted_a_guest_and_tried_once(tmp_path: Path, guest: Guest) -> None:
    """The answer is kept for this monitor and this image; another image, or a renewed monitor, is tried again."""
    program = monitor(tmp_path, f"echo {HELLO}")
    runtime = str(tmp_path / "runtime")
    assert accelerator(program, guest, runtime).accelerator == "kvm"
    assert accelerator(program, guest, runtime).accelerator == "kvm"
    assert starts(tmp_path) == 1
    assert accelerator(program, guest._replace(manifest="1" * 64), runtime).accelerator == "kvm"
    assert starts(tmp_path) == 2
    monitor(tmp_path, "exit 1")
    assert accelerator(program, guest, runtime).accelerator == "tcg"


@pytest.mark.usefixtures("kvm_is_worth_a_try")
def test_kvm_that_boots_nothing_is_not_used(tmp_path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /dev/kvm opens and a guest stays silent, guests are emulated, with the reason; that answer is kept too."""
    monkeypatch.setattr(vm_probe, "hear", lambda *_, **__: vm_probe.Heard(0, "a guest said nothing for 5 s"))
    verdict = accelerator(monitor(tmp_path, "exit 1"), guest, str(tmp_path / "runtime"))
    assert (verdict.accelerator, verdict.why) == ("tcg", "KVM boots nothing here: a guest said nothing for 5 s")


@pytest.mark.usefixtures("kvm_is_worth_a_try")
@pytest.mark.parametrize("damage", ["", "{}", "[[], {}]", "null"])
def test_a_kept_answer_that_is_damaged_is_found_again(tmp_path: Path, guest: Guest, damage: str) -> None:
    """A file that is not what was kept is no answer."""
    program, runtime = monitor(tmp_path, f"echo {HELLO}"), tmp_path / "runtime"
    assert accelerator(program, guest, str(runtime)).accelerator == "kvm"
    (runtime / "accelerator.json").write_text(damage)
    assert accelerator(program, guest, str(runtime)).accelerator == "kvm"
    assert starts(tmp_path) == 2


def test_without_a_processor_that_can_nothing_is_started(
    tmp_path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device, or neither vmx nor svm: emulation, at once."""
    monkeypatch.setattr(vm_probe, "why_not_kvm", lambda: "there is no /dev/kvm")
    verdict = accelerator(monitor(tmp_path, f"echo {HELLO}"), guest, str(tmp_path / "runtime"))
    assert verdict.accelerator == "tcg"
    assert starts(tmp_path) == 0


def test_an_emulated_guest_is_told_its_clock(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's boot by emulation has `tsc_early_khz` where the host says its rate, and that by KVM has not."""
    asked: list[str] = []
    monkeypatch.setattr(vm_probe, "hear", lambda argv, **_: asked.append(" ".join(argv)) or vm_probe.Heard(1.0))
    monkeypatch.setattr(vm_probe, "cpuinfo", lambda: "bogomips : 5000.00\n")
    vm_accelerator.boot_time("/qemu", guest, "tcg")
    vm_accelerator.boot_time("/qemu", guest, "kvm")
    assert "tsc_early_khz=2500000" in asked[0]
    assert "tsc_early_khz" not in asked[1]
