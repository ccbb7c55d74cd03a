"""Trials: doing a thing once, in a process of its own, is the only honest way to learn that it works.

Run as a program, `python3 -I trial.py NAME`: it prints `yes`, or `no: ` and a reason. The caller
gives it a time limit, since a kernel feature that is half there may hang (a /dev/kvm that opens
proves nothing). Standard library only, so that it starts fast. It changes nothing that outlives
it: mounts are made in namespaces that end with the process, and files are removed. Which answer is
good is not known here.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import struct
import sys
import tempfile
import time

CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWUSER = 0x10000000
MS_REC, MS_PRIVATE, MNT_DETACH = 0x4000, 1 << 18, 2  # linux/mount.h, umount(2)

# linux/kvm.h, x86.
KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_RUN = 0xAE41, 0x4020AE46, 0xAE80
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
SIZE_OF_SREGS, EXIT_HLT, API_VERSION = 312, 5, 12
GUEST_ADDRESS, PAGE = 0x1000, 4096
# mov ecx, 1000000; 1: dec ecx; jnz 1b; hlt (16-bit real mode)
GUEST_CODE = bytes.fromhex("66b940420f00664975fcf4")
GUEST_LIMIT_S = 0.1  # a virtualized guest takes about a millisecond, an emulated one was seen to take 0.8 s

libc = ctypes.CDLL(None, use_errno=True)


class TrialError(Exception):
    """The trial ran and the answer is no."""


def overlay() -> None:
    """Mount an overlay as an unprivileged user does: in a user namespace, with userxattr (Linux 5.11).

    The layers lie on the file system where those of runs would: a tmpfs keeps no user attributes before Linux 6.6.
    """
    home = os.environ.get("HOME", "")
    places = (path for path in (f"{home}/.local/state", home) if home and os.access(path, os.W_OK))
    layers = tempfile.mkdtemp(prefix="cloister-trial.", dir=next(places, "/var/tmp"))  # noqa: S108  # not a tmpfs
    uid, gid = os.geteuid(), os.getegid()
    try:
        _check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        _mount(b"none", b"/", b"", MS_REC | MS_PRIVATE, b"")
        os.chdir(layers)  # relative names below: a path could hold a comma or a colon
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(name)
        _mount(b"overlay", b"merged", b"overlay", 0, b"lowerdir=lower,upperdir=upper,workdir=work,userxattr")
        os.mkdir("merged/file")
        os.rename("merged/file", "merged/moved")
    finally:
        libc.umount2(os.fsencode(f"{layers}/merged"), MNT_DETACH)
        shutil.rmtree(layers, ignore_errors=True)


def kvm() -> None:
    """Run a guest of eleven bytes that counts to a million and halts, and look how long it took.

    Opening /dev/kvm, or even making a virtual machine, succeeds on hosts where a guest hangs or
    every instruction is emulated; so the guest must halt, and in time.
    """
    if os.uname().machine != "x86_64":
        raise TrialError("there is a trial for x86_64 only")
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(device, KVM_GET_API_VERSION) != API_VERSION:
        raise TrialError("unknown KVM API version")
    machine = fcntl.ioctl(device, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, PAGE)
    memory.write(GUEST_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, GUEST_ADDRESS, PAGE, address))
    processor = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
    state = mmap.mmap(processor, fcntl.ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0))
    system = bytearray(SIZE_OF_SREGS)
    fcntl.ioctl(processor, KVM_GET_SREGS, system)
    struct.pack_into("<Q", system, 0, 0)  # cs.base
    struct.pack_into("<H", system, 12, 0)  # cs.selector
    fcntl.ioctl(processor, KVM_SET_SREGS, bytes(system))
    registers = [0] * 18
    registers[16], registers[17] = GUEST_ADDRESS, 2  # rip, rflags
    fcntl.ioctl(processor, KVM_SET_REGS, struct.pack("<18Q", *registers))
    started = time.monotonic()
    fcntl.ioctl(processor, KVM_RUN, 0)
    took = time.monotonic() - started
    (reason,) = struct.unpack_from("<I", state, 8)
    if reason != EXIT_HLT:
        raise TrialError(f"the guest ended with KVM exit reason {reason} instead of a halt")
    if took > GUEST_LIMIT_S:
        raise TrialError(f"the guest took {took:.1f} s for a million rounds: it is emulated, not virtualized")


def main(name: str) -> str:
    """Return the answer of the trial `name` as the one line the caller reads."""
    try:
        {"overlay": overlay, "kvm": kvm}[name]()
    except (OSError, TrialError) as error:
        return f"no: {error}"
    return "yes"


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
    _check(libc.mount(source, target, kind, ctypes.c_ulong(flags), data), f"mount {kind.decode() or 'private'}")


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]) + "\n")
