"""Call the kernel through the 32-bit gate, int 0x80."""

import ctypes
import errno
import os

from cloister.prove.inside.support import Box, scratch

ID = "kernel-int80"
TITLE = "Call the kernel through the 32-bit gate, int 0x80"
PROMISE = "P-037"
CLASSES = (29,)
EXPECT = "seccomp sees the foreign architecture and refuses"
SHAPE = "any"
ARCH = ("x86_64",)


CALLS = {"getpid": 20, "socketcall": 102, "unshare": 310, "ptrace": 26}


def attack(box: Box) -> None:
    """Execute machine code from a file: push rbx; mov eax, NUMBER; xor ebx, ebx; int 0x80; pop rbx; ret."""
    for name, number in CALLS.items():
        child = os.fork()
        if child == 0:
            with scratch(f"/tmp/int80-{number}") as path:
                result = execute(path, b"\x53\xb8" + number.to_bytes(4, "little") + b"\x31\xdb\x31\xc9\xcd\x80\x5b\xc3")
            os._exit(0 if result >= 0 else min(-result, 250))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            box.must(code in (-31, -11), f"{name}: ended by signal {-code}")
        else:
            box.must(code in (errno.EPERM, errno.ENOSYS), f"{name}: {errno.errorcode.get(code, f'worked ({code})')}")


def execute(path: str, code: bytes) -> int:
    """Map code from a file, which works where memory may not be writable and executable, and call it."""
    with open(path, "wb") as file:
        file.write(code.ljust(4096, b"\xcc"))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with open(path, "rb") as file:
        address = libc.mmap(None, ctypes.c_size_t(4096), 5, 2, file.fileno(), ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap of code")
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
