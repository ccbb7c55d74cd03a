"""Giving back memory that is shared with others: what the filter of a monitor lets seem done, and what it does not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from cloister.host import vm_memory
from cloister.isolation import seccomp
from cloister.isolation.discards import pretended

pytestmark = pytest.mark.kernel
SIZE = 1 << 20
MONITOR = """
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
shared, disk, size = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
KEEP, PUNCH, ZERO = 1, 2, 16
def fallocate(descriptor, mode, length=4096):
    ctypes.set_errno(0)
    failed = libc.fallocate(descriptor, mode, ctypes.c_long(0), ctypes.c_long(length))
    return os.strerror(ctypes.get_errno()) if failed else "done"
def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty:"))
memory = mmap.mmap(shared, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
memory[:] = b"m" * size
held, said = resident(), {"punch": fallocate(shared, PUNCH | KEEP, size)}
memory.madvise(mmap.MADV_DONTNEED)
said |= {"freed": held - resident(), "first": memory[0], "other": fallocate(shared, ZERO | KEEP)}
said |= {"file": os.pread(shared, 1, 0)[0], "room": fallocate(disk, 0, 8192), "length": os.fstat(disk).st_size}
print(json.dumps(said))
"""


def under(narrow: bytes, shared: int, disk: int) -> dict[str, object]:
    """Return what a program sees of sealed memory and of a disk below a filter."""
    descriptor = os.memfd_create("filter")
    os.write(descriptor, narrow)
    os.lseek(descriptor, 0, os.SEEK_SET)
    jail = ["bwrap", "--ro-bind", "/", "/", "--proc", "/proc", "--seccomp", str(descriptor), "--"]
    words = [sys.executable, "-c", MONITOR, str(shared), str(disk), str(SIZE)]
    done = subprocess.run(
        [*jail, *words], capture_output=True, text=True, check=False, pass_fds=(descriptor, shared, disk)
    )
    os.close(descriptor)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture
def shared() -> int:
    """A template's memory, as monitors get it."""
    template = vm_memory.new("template", SIZE)
    os.pwrite(template, b"t" * SIZE, 0)
    vm_memory.seal(template)
    return os.open(f"/proc/self/fd/{template}", os.O_RDWR)  # as QEMU opens it


def test_a_page_goes_back_and_is_the_templates_again(shared: int, tmp_path: object) -> None:
    """A hole in shared memory seems made, so QEMU drops its copy; what others see of the page is as it was.

    Other modes of the call are the kernel's to answer: memory has none that clears, a disk gets its room.
    Without the filter the hole fails, which is where QEMU 7.2 to 10 give up.
    """
    plain = seccomp.assemble(platform.machine(), netlink=False)
    disk = os.open(f"{tmp_path}/disk", os.O_RDWR | os.O_CREAT)
    filtered = under(pretended(platform.machine(), plain), shared, disk)
    freed = filtered.pop("freed")
    assert isinstance(freed, int)
    assert freed >= (SIZE >> 10) - 64
    right = {"punch": "done", "first": ord("t"), "other": "Operation not supported", "file": ord("t"), "room": "done"}
    assert filtered == {**right, "length": 8192}
    assert under(plain, shared, disk)["punch"] == "Operation not permitted"


def test_every_other_call_is_the_other_filters(shared: int) -> None:
    """What the sandbox's filter refuses stays refused behind this one."""
    plain = seccomp.assemble(platform.machine(), netlink=False)
    both = pretended(platform.machine(), plain)
    assert both.endswith(plain)
    for narrow in (plain, both):
        descriptor = os.memfd_create("filter")
        os.write(descriptor, narrow)
        os.lseek(descriptor, 0, os.SEEK_SET)
        probe = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); print(libc.unshare(0x10000000), "
        probe += "os.strerror(ctypes.get_errno()))"
        words = ["bwrap", "--ro-bind", "/", "/", "--seccomp", str(descriptor), "--", sys.executable, "-c", probe]
        done = subprocess.run(words, capture_output=True, text=True, check=True, pass_fds=(descriptor,))
        os.close(descriptor)
        assert done.stdout == "-1 Operation not permitted\n"
