"""Templates of guests: made whole or not at all, believed only as they were made, and shared without being given away.

The monitor boots nothing (`support/fake_monitor.py`); real guests are in tests/microvm/test_warm_templates.py.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from cloister.errors import RetryError, StepError
from cloister.host import vm_memory, vm_template, vm_template_make, vm_template_monitor
from cloister.host.vm_template_qemu import Machine, Qemu
from cloister.plan.vm_template import MEMORY, RECORD, STATE, Shape, Template
from support import fake_monitor

pytestmark = pytest.mark.kernel
SHAPE = Shape(
    image="test", version=1, manifest="0" * 64, program="/usr/bin/true 1 2 3", accelerator="tcg", host="1" * 64,
    memory_mib=64, cpus=1, machine="2" * 64,
)  # fmt: skip


def machine(mode: str = "good", seconds: float = 0.0) -> Machine:
    """Return the fake monitor as a maker starts it; in the mode `twin` the one that goes on from the template."""
    argv = (sys.executable, fake_monitor.__file__, mode, str(seconds))
    state = fake_monitor.STATE if mode.startswith("twin") else 0
    return Machine(
        argv=argv, files={}, disks=(8, 9), memory=fake_monitor.MEMORY, orders=fake_monitor.ORDERS, state=state
    )


def make(root: Path, mode: str = "good", shape: Shape = SHAPE, twin: str = "twin") -> Template:
    """Make one."""
    return vm_template_make.make(str(root), shape, Qemu(machine(mode), machine(twin)), settle_s=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of templates."""
    return tmp_path / "templates"


def test_a_template_is_made_found_and_held(root: Path) -> None:
    """What was made is found by its shape, is this user's alone, and is handed out with the content that was made."""
    template = make(root)
    assert vm_template.find(str(root), SHAPE) == template
    directory = root / SHAPE.key()
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(
        (MEMORY, STATE, RECORD), 0o400
    )
    holder = vm_template.Holder()
    held = holder.hold(str(directory), template.digest())
    assert os.pread(held.memory, 12, 1 << 20) == b"guest memory"
    assert os.fstat(held.memory).st_size == 64 << 20
    state = held.state()
    assert os.read(state, 16) == b"state of devices"
    os.close(state)
    holder.release(held)
    holder.close()


def test_what_is_empty_costs_nothing(root: Path) -> None:
    """Of 64 MiB of which a few pages were written, a few pages are kept."""
    template = make(root)
    assert template.stored_bytes <= 64 << 10
    assert (root / SHAPE.key() / MEMORY).stat().st_blocks * 512 <= 1 << 20


def test_nobody_can_change_what_was_handed_out(root: Path) -> None:
    """The copy that monitors get is sealed: writing, growing and writable shared mappings fail; private ones do not."""
    import mmap

    template = make(root)
    held = vm_template.Holder().hold(str(root / SHAPE.key()), template.digest())
    again = os.open(f"/proc/self/fd/{held.memory}", os.O_RDWR)  # as QEMU opens it
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(again, 1)
    with pytest.raises(PermissionError):
        mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with mmap.mmap(again, 64 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
        private[0] = 1
    assert os.pread(held.memory, 1, 0) == b"\0"
    os.close(again)


@pytest.mark.parametrize("name", [MEMORY, STATE])
def test_one_changed_bit_is_refused_and_removed(root: Path, name: str) -> None:
    """A template of which one bit was changed is not started from, and is made anew the next time."""
    template = make(root)
    path = root / SHAPE.key() / name
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(1 << 20 if name == MEMORY else 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o400)
    with pytest.raises(StepError) as caught:
        vm_template.Holder().hold(str(root / SHAPE.key()), template.digest())
    assert caught.value.reference == "template-changed"
    assert vm_template.find(str(root), SHAPE) is None
    assert make(root).state == template.state


def test_another_record_than_the_plan_names_is_refused(root: Path) -> None:
    """A record that was exchanged, together with its files, has another digest than the plan: nothing is started."""
    template = make(root)
    digest = template.digest()
    record = root / SHAPE.key() / RECORD
    record.chmod(0o600)
    record.write_bytes(msgspec.json.encode(msgspec.structs.replace(template, made=1.0)))
    record.chmod(0o400)
    with pytest.raises(StepError, match="another one"):
        vm_template.Holder().hold(str(root / SHAPE.key()), digest)


@pytest.mark.parametrize(
    "change",
    [{"manifest": "3" * 64}, {"program": "/usr/bin/true 1 2 4"}, {"host": "3" * 64}, {"machine": "3" * 64},
     {"memory_mib": 128}, {"cpus": 2}, {"accelerator": "kvm"}, {"version": 2}],
)  # fmt: skip
def test_a_template_is_for_one_shape_only(root: Path, change: dict[str, object]) -> None:
    """Another image, monitor, processor, argv or size finds no template, even under the name it would have."""
    make(root)
    other = msgspec.structs.replace(SHAPE, **change)
    assert vm_template.find(str(root), other) is None
    (root / SHAPE.key()).rename(root / other.key())
    assert vm_template.find(str(root), other) is None
    assert [found for _, found in vm_template.every(str(root))] == [None]
    vm_template.tidy(str(root))
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("mode", [0o444, 0o600, 0o404])
def test_files_that_others_could_have_changed_are_none(root: Path, mode: int) -> None:
    """A memory that others may read or anybody may write is no template: it is not found."""
    make(root)
    (root / SHAPE.key() / MEMORY).chmod(mode)
    assert vm_template.find(str(root), SHAPE) is None


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    """A link in the place of a file makes it no template."""
    make(root)
    memory = root / SHAPE.key() / MEMORY
    memory.rename(tmp_path / "elsewhere")
    memory.symlink_to(tmp_path / "elsewhere")
    assert vm_template.find(str(root), SHAPE) is None


@pytest.mark.parametrize(
    ("mode", "reference"),
    [("stranger", "guest-silent"), ("odd", "guest-silent"), ("refuses", "monitor-failed")],
)  # fmt: skip
def test_a_guest_or_monitor_that_fails_leaves_nothing(root: Path, mode: str, reference: str) -> None:
    """A guest that answers wrongly, and a monitor that refuses, are told; nothing of theirs is left."""
    with pytest.raises(StepError) as caught:
        make(root, mode)
    assert caught.value.reference == reference
    assert "\x1b" not in caught.value.message
    assert list(root.iterdir()) == []
    assert make(root)


def test_making_one_leaves_no_descriptor(root: Path) -> None:
    """A broker makes many: neither one that came to be nor one that did not leaves anything open."""
    make(root)
    before = len(os.listdir("/proc/self/fd"))
    make(root, shape=msgspec.structs.replace(SHAPE, cpus=2))
    for mode, twin in (("refuses", "twin"), ("stranger", "twin"), ("good", "twin-lost")):
        with pytest.raises(StepError):
            make(root, mode, msgspec.structs.replace(SHAPE, cpus=3), twin)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("twin", "reference"), [("twin-lost", "guest-silent"), ("twin-changed", "template-failed")])
def test_what_no_machine_can_start_from_is_no_template(root: Path, twin: str, reference: str) -> None:
    """A machine is started from it before it has a name: one that does not come up, or as another, ends it."""
    with pytest.raises(StepError) as caught:
        make(root, twin=twin)
    assert caught.value.reference == reference
    assert ("the state is not what it was" in caught.value.message) is (twin == "twin-lost")
    assert list(root.iterdir()) == []
    assert make(root)


def test_a_silent_guest_is_not_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that says nothing is ended, and its last words on the console are told."""
    monkeypatch.setattr(vm_template_monitor, "BOOT_TIMEOUT_S", 1.0)
    with pytest.raises(StepError, match="the guest is stuck"):
        make(root, "silent")
    assert list(root.iterdir()) == []


MAKER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from kernel import test_template_files as tests
from cloister.host import vm_template_make
from cloister.host.vm_template_qemu import Qemu
machines = tests.machine({mode!r}, {seconds}), tests.machine("twin")
vm_template_make.make({root!r}, tests.SHAPE, Qemu(*machines), settle_s={settle})
print("made", flush=True)
"""


def maker(root: Path, mode: str = "good", seconds: float = 0.0, settle: float = 0.0) -> subprocess.Popen[bytes]:
    """Start another process that makes the template."""
    tests = str(Path(__file__).parent.parent)
    text = MAKER.format(path=[*sys.path, tests], root=str(root), mode=mode, seconds=seconds, settle=settle)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("mode", "seconds", "settle"), [("good", 30, 0), ("good", 0, 30), ("hangs", 0, 0)], ids=["boot", "settle", "state"]
)
def test_a_maker_that_is_killed_leaves_nothing_that_counts(
    root: Path, mode: str, seconds: float, settle: float
) -> None:
    """A maker killed while its guest boots, settles or is written down leaves no template, no disk and no monitor."""
    process = maker(root, mode, seconds, settle)
    deadline = time.monotonic() + 30
    while not list(root.glob(f"{vm_template.MAKING}*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (living := orphans(mode, seconds)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living
    left = list(root.glob(f"{vm_template.MAKING}*/*"))
    assert not [path for path in left if path.name.startswith("disk")]
    assert vm_template.find(str(root), SHAPE) is None
    assert make(root)
    assert [path.name for path in root.iterdir()] == [SHAPE.key()]


def orphans(mode: str, seconds: float) -> list[int]:
    """Return fake monitors that live; no jail around them dies with their maker, as around the real one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:4] == [fake_monitor.__file__.encode(), mode.encode(), str(seconds).encode()]:
            found.append(int(entry.parent.name))
    return found


def test_two_makers_do_not_get_in_each_others_way(root: Path) -> None:
    """While one is making a template another is told so; what is being made is not tidied away."""
    process = maker(root, seconds=2.0)
    deadline = time.monotonic() + 30
    while not list(root.glob(f"{vm_template.MAKING}*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    with pytest.raises(RetryError) as caught:
        make(root)
    assert caught.value.reference == "template-busy"
    vm_template.tidy(str(root))
    assert process.wait(30) == 0
    assert vm_template.find(str(root), SHAPE)


def test_older_ones_of_the_same_purpose_go(root: Path) -> None:
    """A template for a newer image takes the place of the older one's; one of another size stays."""
    make(root)
    bigger = msgspec.structs.replace(SHAPE, cpus=2)
    make(root, shape=bigger)
    newer = msgspec.structs.replace(SHAPE, version=2, manifest="4" * 64)
    make(root, shape=newer)
    assert {found.shape.key() for _, found in vm_template.every(str(root)) if found} == {bigger.key(), newer.key()}


def test_one_with_a_card_and_one_without_stay_side_by_side(root: Path) -> None:
    """An agent on the bridge and one without a card do not throw each other's template away."""
    card = msgspec.structs.replace(SHAPE, card=True, machine="5" * 64)
    for shape in (SHAPE, card, SHAPE, card):
        make(root, shape=shape)
    assert vm_template.find(str(root), SHAPE)
    assert vm_template.find(str(root), card)


@pytest.mark.parametrize(("bound", "least", "stays"), [("_KEEP", 3, 3), ("_KEEP_BYTES", 1, 1), ("_KEEP_BYTES", 9, 6)])
def test_templates_do_not_pile_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, bound: str, least: int, stays: int
) -> None:
    """Beyond a number, or beyond what they may take of the disk, those go that were started from the longest ago.

    Each size of memory that a policy ever had has one. The one used last stays, also alone above the bound.
    """
    shapes = [msgspec.structs.replace(SHAPE, memory_mib=64 + number) for number in range(6)]
    for age, shape in enumerate(shapes):
        make(root, shape=shape)
        os.utime(root / shape.key(), (1_000_000 - age, 1_000_000 - age))
    one = vm_template.stored(str(root / SHAPE.key()))
    assert one > 0
    monkeypatch.setattr(vm_template, bound, least if bound == "_KEEP" else least * one)
    gone = vm_template.tidy(str(root))
    assert [os.path.basename(path) for path in gone] == [shape.key() for shape in shapes[stays:]]
    assert [vm_template.find(str(root), shape) is not None for shape in shapes] == [n < stays for n in range(6)]
    assert vm_template.tidy(str(root)) == []


def test_the_copies_digest_is_that_of_the_content(tmp_path: Path) -> None:
    """Holes and written zeroes count the same; one byte elsewhere does not."""

    def file(name: str, *pieces: tuple[int, bytes]) -> int:
        descriptor = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, 1 << 20)
        for at, data in pieces:
            os.pwrite(descriptor, data, at)
        return descriptor

    sparse = file("sparse", (300_000, b"x"))
    dense = file("dense", (0, bytes(1 << 20)), (300_000, b"x"))
    moved = file("moved", (300_001, b"x"))
    target = vm_memory.new("copy", 1 << 20)
    digest, stored = vm_memory.copy(dense, target, 1 << 20)
    assert digest == vm_memory.digest(sparse, 1 << 20) == vm_memory.digest(target, 1 << 20)
    assert digest != vm_memory.digest(moved, 1 << 20)
    assert stored == vm_memory.PAGE
    vm_memory.seal(target)
    assert fcntl.fcntl(target, fcntl.F_GET_SEALS)
    for descriptor in (sparse, dense, moved, target):
        os.close(descriptor)
