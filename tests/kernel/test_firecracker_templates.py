"""Templates of Firecracker's machines, made with a monitor that does its part, and with ones that do worse."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import msgspec
import pytest

from cloister.errors import CloisterError, StepError
from cloister.host import vm_template, vm_template_make, vm_template_monitor
from cloister.host.vm_template_firecracker import DIRECTORY, Firecracker, Machine
from cloister.isolation import firecracker
from cloister.isolation.firecracker_api import Request, parse_version
from cloister.plan.vm_template import MEMORY, RECORD, STATE, Shape, Template
from cloister.runs.vm_warm import Wanted
from support import fake_firecracker

pytestmark = pytest.mark.kernel
SHAPE = Shape(
    image="test", version=1, manifest="0" * 64, program="/usr/bin/true 1 2 3", accelerator="kvm", host="1" * 64,
    memory_mib=64, cpus=1, machine="2" * 64,
)  # fmt: skip
WANTED = Wanted("test", 1, "0" * 64, "firecracker", "/fc", "kvm", "quiet", 64, 1)
PLACE = firecracker.Place(directory="/run/cloister/vm")
MADE = firecracker.Machine(cmdline="quiet")


def goes_on(version: str) -> tuple[Request, ...]:
    """Return what a machine from the template is asked for."""
    return firecracker.warm_requests(WANTED.launch(), MADE, PLACE, parse_version(version))


def boots(version: str) -> tuple[Request, ...]:
    """Return what the other one is asked for."""
    goes_on(version)
    return firecracker.start_requests(WANTED.launch(), MADE, PLACE, parse_version(version))


def machine(root: Path, mode: str, *, making: bool) -> Machine:
    """Return the fake monitor as a maker starts it."""
    directory = vm_template_make.making_directory(str(root), SHAPE)
    hold = firecracker.create_snapshot(f"/proc/self/fd/{fake_firecracker.STATE}", "/proc/self/fd/10")
    return Machine(
        argv=(sys.executable, fake_firecracker.__file__, mode, f"{directory}/{DIRECTORY}"), files={}, disks=(8, 9),
        memory=fake_firecracker.MEMORY, state=fake_firecracker.STATE, begin=boots if making else goes_on,
        hold=(firecracker.set_state("Paused"), hold) if making else (),
    )  # fmt: skip


def make(root: Path, mode: str = "good", twin: str = "good") -> Template:
    """Make one."""
    machines = machine(root, mode, making=True), machine(root, twin, making=False)
    maker = Firecracker(*machines, api="api.sock", channel="vsock.sock", port=5000)
    return vm_template_make.make(str(root), SHAPE, maker, settle_s=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of templates."""
    return tmp_path / "templates"


def test_a_template_is_made_and_held(root: Path) -> None:
    """What the monitor wrote into its descriptors is what is held for others; of its directory nothing stays."""
    template = make(root)
    assert vm_template.find(str(root), SHAPE) == template
    directory = root / SHAPE.key()
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(
        (MEMORY, STATE, RECORD), 0o400
    )
    holder = vm_template.Holder()
    held = holder.hold(str(directory), template.digest())
    state = held.state()
    assert os.read(state, 1 << 16) == fake_firecracker.WRITTEN
    assert os.pread(held.memory, 12, 1 << 20) == b"guest memory"
    assert os.fstat(held.memory).st_size == 64 << 20
    os.close(state)
    holder.release(held)
    holder.close()


BAD = [
    ("grown", "good", "template-failed", "another size"),
    ("endless", "good", "template-failed", "a state of"),
    ("empty", "good", "template-failed", "a state of 0 bytes"),
    ("deaf", "good", "firecracker-refused", "1.16.0"),
    ("good", "twin-lost", "firecracker-refused", "the state is not what it was"),
    ("good", "twin-changed", "template-failed", "another one"),
]


@pytest.mark.parametrize(("mode", "twin", "reference", "words"), BAD, ids=[f"{mode} {twin}" for mode, twin, *_ in BAD])
def test_what_is_no_template_is_told_and_leaves_nothing(
    root: Path, mode: str, twin: str, reference: str, words: str
) -> None:
    """Files that cannot be right, a version that restores nobody, a machine that does not come up from it."""
    with pytest.raises(CloisterError, match=words) as caught:
        make(root, mode, twin)
    assert caught.value.reference == reference
    assert list(root.iterdir()) == []
    assert make(root)


@pytest.mark.parametrize("mode", ["link", "file", "babble", "silent"])
def test_a_socket_that_is_none_of_the_guests_is_not_talked_to(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A monitor puts a link to another program's socket in the place of its own: nobody connects there."""
    monkeypatch.setattr(vm_template_monitor, "BOOT_TIMEOUT_S", 2.0)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(os.path.relpath(tmp_path / "another.sock"))
        another.listen()
        another.settimeout(0.1)
        with pytest.raises(StepError) as caught:
            make(root, mode)
        with pytest.raises(TimeoutError):
            another.accept()
    assert caught.value.reference == "guest-silent"
    assert ("the guest is stuck" in caught.value.message) is (mode == "silent")
    assert list(root.iterdir()) == []


def test_what_the_monitor_leaves_in_its_directory_goes(root: Path) -> None:
    """Fifteen hundred directories within each other, the last one locked, are no part of the template."""
    make(root, "deep", "deep")
    assert sorted(path.name for path in (root / SHAPE.key()).iterdir()) == [MEMORY, RECORD, STATE]


def test_making_one_leaves_no_descriptor(root: Path) -> None:
    """Neither one that came to be nor one that did not leaves anything open."""
    make(root)
    before = len(os.listdir("/proc/self/fd"))
    vm_template.remove(str(root / SHAPE.key()))
    make(root)
    for mode, twin in (("grown", "good"), ("good", "twin-lost"), ("deaf", "good")):
        vm_template.remove(str(root / SHAPE.key()))
        with pytest.raises(CloisterError):
            make(root, mode, twin)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_monitor_that_dies_is_not_waited_for(root: Path) -> None:
    """One that ends before it listens is told at once, with its last words."""
    argv = ("/bin/sh", "-c", "echo no KVM here; exit 1")
    dead = msgspec.structs.replace(machine(root, "good", making=True), argv=argv)
    maker = Firecracker(dead, dead, api="api.sock", channel="vsock.sock", port=5000)
    began = time.monotonic()
    with pytest.raises(StepError, match="no KVM here"):
        vm_template_make.make(str(root), SHAPE, maker, settle_s=0)
    assert time.monotonic() - began < 10
    assert list(root.iterdir()) == []
