"""The cases that attack a guest can fail: where its first process leaves out a lock, they say what got through."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cloister.images.initramfs import guest_entries, modules_of, newc
from cloister.policy.model import Images
from cloister.prove.case import load
from cloister.prove.runner import Result
from cloister.runs.images import Builder, ImagePlaces
from microvm.conftest import GuestImage
from microvm.test_boot import make_disk
from support import guest_machine
from support.cloister import User
from support.guest_link import fields
from support.guest_machine import GuestMachine, line
from support.weak_battery import ProxyLink, attack, carried
from support.weak_guests import LOCKS, OPEN, Change, Workshop

OF_GUESTS = sorted(name for name, case in load().items() if "microvm" in case.if_policy)
pytestmark = pytest.mark.timeout(420)
PROJECT = "/work/project"
PRIVATE = "/run/cloister/private/dev"
PORT = "vport3p1"
"""The channel's, in QEMU's machines."""
NOT_THERE = {
    "/sys/kernel/uevent_helper",
    *(
        f"{place}/{name}"
        for place in ("/dev", PRIVATE)
        for name in ("mapper/root", "kmem", "port", "vhost-vsock", *(f"vport{n}p1" for n in range(8)))
        if name != PORT
    ),
}
"""What the tests' kernel has not, or another monitor's machines have, whoever asks."""


class Weakened:
    """Boots guests with this or that changed in their first process, and attacks them."""

    def __init__(self, image: GuestImage, folder: Path) -> None:
        """Compile what all of them share."""
        self._folder, self._booted = folder, guest_machine.of(image)
        self._modules = modules_of(self._booted.initramfs.read_bytes())
        self.workshop = Workshop(folder / "shims")

    def attacked(self, name: str, changes: Sequence[Change]) -> dict[str, Result]:
        """Return what came of each case in a guest with these changes."""
        initramfs = self._folder / f"{name}.cpio"
        disks = {role: make_disk(self._folder / f"{name}-{role}.img") for role in ("var", "workspace")}
        initramfs.write_bytes(newc(guest_entries(self.workshop.make(name, changes).read_bytes(), self._modules)))
        base = self._folder / name
        base.mkdir()
        booted = self._booted._replace(initramfs=initramfs)
        with GuestMachine(booted, line(booted), disks) as machine:
            link = ProxyLink(machine.channel)
            link.join()
            link.begin(fields(workspace=PROJECT), carried())
            return attack(link, PROJECT, base, OF_GUESTS)


@pytest.fixture(scope="module")
def weakened(image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Weakened:
    """A workshop for guests of the tests' image."""
    return Weakened(image, tmp_path_factory.mktemp("weak"))


def named(result: Result) -> set[str]:
    """Return what a case tried, by the words before what came of it."""
    return {part.rsplit(": ", 1)[0] for part in result.detail.split("; ")}


def outcomes(results: dict[str, Result]) -> dict[str, str]:
    """Return what came of each case, without the reasons."""
    return {name: result.outcome for name, result in results.items()}


@pytest.mark.slow
def test_no_attempt_of_a_case_is_one_that_always_fails(weakened: Weakened) -> None:
    """What an honest guest stops gets through where nothing holds, attempt by attempt, but for what no machine has."""
    honest, opened = weakened.attacked("honest", ()), weakened.attacked("nothing", OPEN)
    never = {name: named(honest[name]) - named(opened[name]) for name in OF_GUESTS}

    assert outcomes(honest) == dict.fromkeys(OF_GUESTS, "denied")
    assert outcomes(opened) == dict.fromkeys(OF_GUESTS, "allowed")
    assert set().union(*never.values()) - NOT_THERE == set()


LEFT_OUT = {
    "modules": {"vm-kernel-locked": {"modules_disabled is set"}},
    "kexec": {"vm-kernel-locked": {"kexec_load_disabled is set"}},
    "messages": {"vm-kernel-locked": {"dmesg_restrict is set"}},
    "devices": {"vm-disks": {"/dev/vda", "/dev/dm-0", "/dev/vdc"}, "vm-channel": {f"/dev/{PORT}", "/dev/ttyS0"}},
    "root": {"vm-root": {"/usr", "/opt", "/usr is mounted read-only"}},
    "tree": {"vm-root": {"/ is mounted read-only"}},
    "uid": {
        "vm-root": {"/run/cloister", "/etc"},
        "vm-disks": {f"{PRIVATE}/vda", f"{PRIVATE}/dm-0"},
        "vm-channel": {f"{PRIVATE}/{PORT}"},
        "vm-kernel-locked": {"/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"},
    },
    "families": {"vm-channel": {"AF_VSOCK"}},
}
"""For each lock the cases that must find it missing, and some of what they must say."""


@pytest.mark.slow
@pytest.mark.parametrize("lock", LEFT_OUT)
def test_each_lock_that_is_left_out_is_found_out(lock: str, weakened: Weakened) -> None:
    """A guest without one lock fails the cases that are about it, by what it let through, and no other."""
    results = weakened.attacked(lock, LOCKS[lock])
    expected = LEFT_OUT[lock]

    assert outcomes(results) == {name: "allowed" if name in expected else "denied" for name in OF_GUESTS}, results
    lacking = {name: said - named(results[name]) for name, said in expected.items()}
    assert not any(lacking.values()), (lacking, [result.detail for result in results.values()])


def test_every_lock_has_its_guest() -> None:
    """Each lock that can be left out is tried, and each case is failed by one of them at least."""
    assert set(LEFT_OUT) == set(LOCKS)
    assert set().union(*LEFT_OUT.values()) == set(OF_GUESTS)


POLICY = """\
schema = 1
[agents.shell]
preset = "shell"
isolation = "microvm"
environment_audit = false
[agents.shell.microvm]
image = "test"
memory = "256M"
warm = false
"""


@pytest.fixture
def weak_user(home: Path, image: GuestImage, weakened: Weakened, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    """A user whose newest image was signed with a key of theirs, and has a first process that holds nothing."""
    user = User(home, POLICY)
    image.install(home)
    data, config = home / ".local/share/cloister", home / ".config/cloister"
    where = ImagePlaces(
        store=str(data / "images"), key=str(home / "key/image-key.pem"), trust=str(config / "trust.d"),
        seen=str(home / "seen.json"), system_store=str(home / "none"), system_trust=str(home / "none"),
    )  # fmt: skip
    monkeypatch.setattr("cloister.runs.images.SHIM", weakened.workshop.make("signed", OPEN))
    Builder(where, lambda _: None).renew("test", Images(), os.getuid())
    trusted = config / "trust.d/weak.pub"
    trusted.write_bytes(Path(f"{where.key}.pub").read_bytes())
    trusted.chmod(0o600)
    yield user
    user.close()


@pytest.mark.slow
def test_the_program_says_so_of_a_weak_image(weak_user: User, workspace: Path) -> None:
    """`cloister prove` with such an image, signed and trusted as any, reports each case as got through, and fails."""
    chosen = [word for name in OF_GUESTS for word in ("--case", name)]
    done = weak_user.run("prove", "--json", *chosen, "shell", cwd=workspace, timeout_s=400)
    assert done.stdout.startswith("{"), done.stderr
    found = {case["id"]: case["outcome"] for case in json.loads(done.stdout)["cases"]}

    assert found == dict.fromkeys(OF_GUESTS, "allowed"), done.stdout
    assert done.returncode == 1
