"""The words in which cases are written: refused, breach, stopped; system calls by name; the proxy by hand.

Runs inside the sandbox with the system's Python and its standard library, nothing else. A case
that hits an error it did not foresee proves nothing, so everything that is neither the
expected refusal nor a success is a surprise, and a surprise is never a pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

PROXY = ("127.0.0.1", 3128)
DIALLED = ("connect-failed", "connect-timeout", "dns-failed", "bad-gateway", "upstream-proxy-failed")
"""Reasons that the proxy gives only after it has let a target pass."""

_GENERIC = {"aarch64": 1, "riscv64": 1}
# x86_64 (asm/unistd_64.h), then asm-generic/unistd.h; -1: the architecture does not have it.
NUMBERS = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bpf": (321, 280), "chroot": (161, 51),
    "clone": (56, 220), "clone3": (435, 435), "delete_module": (176, 106), "fanotify_init": (300, 262),
    "finit_module": (313, 273), "fsopen": (430, 430), "init_module": (175, 105), "io_uring_setup": (425, 425),
    "ioctl": (16, 29), "iopl": (172, -1), "kcmp": (312, 272), "kexec_load": (246, 104), "keyctl": (250, 219),
    "memfd_create": (319, 279), "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "openat2": (437, 437), "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434), "pivot_root": (155, 41), "prctl": (157, 167), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "ptrace": (101, 117), "reboot": (169, 142), "renameat2": (316, 276),
    "request_key": (249, 218), "seccomp": (317, 277), "setns": (308, 268), "settimeofday": (164, 170),
    "shmat": (30, 196), "shmctl": (31, 195), "shmget": (29, 194), "socket": (41, 198), "swapon": (167, 224),
    "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class CannotRunError(Exception):
    """This case cannot be tried here; the text says why."""


def syscall(name: str, *arguments: Any) -> int:
    """Make a system call by name; numbers go as longs, bytes and buffers by address.

    Raises:
        OSError: the kernel refused.
        CannotRunError: the architecture does not have the call.
    """
    number = NUMBERS[name][_GENERIC.get(platform.machine(), 0)]
    if number < 0:
        raise CannotRunError(f"{platform.machine()} has no {name}")
    return raw_syscall(number, *arguments)


def raw_syscall(number: int, *arguments: Any) -> int:
    """Make a system call by number.

    Raises:
        OSError: the kernel refused.
    """
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *passed))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def in_child(action: Callable[..., Any], *arguments: Any) -> None:
    """Do something in a forked child, for what would change the caller for good.

    Raises:
        OSError: the child's own error.
        ChildProcessError: the child was ended by a signal.
    """
    child = os.fork()
    if child == 0:
        code = 0
        try:
            action(*arguments)
        except OSError as error:
            code = error.errno or 255
        except BaseException:  # noqa: BLE001  # whatever it was, the child must not return into the case
            code = 254
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildProcessError(0, f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    if code := os.WEXITSTATUS(status):
        raise OSError(code, os.strerror(code))


class Box:
    """One case's view of the sandbox: facts from the host, and what came of the attempts."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.breaches: list[str] = []
        self.stops: list[str] = []
        self.surprises: list[str] = []
        self.workspace = str(facts["workspace"])
        self.home = os.environ.get("HOME", "/")

    def fact(self, name: str) -> Any:
        """Return what the host prepared.

        Raises:
            CannotRunError: it could not prepare it.
        """
        if name not in self.facts:
            raise CannotRunError(f"the host has not prepared {name}")
        return self.facts[name]

    def path(self, name: str) -> str:
        """Return a path below the workspace."""
        return f"{self.workspace}/{name}"

    def breach(self, what: str) -> None:
        """Record that an attack succeeded."""
        self.breaches.append(what)

    def stopped(self, what: str) -> None:
        """Record that an attack failed, and how."""
        self.stops.append(what)

    def must(self, held: bool, what: str) -> None:
        """Record a promise that holds or does not."""
        (self.stops if held else self.breaches).append(what)

    def refused(self, what: str, names: str, action: Callable[..., Any], *arguments: Any) -> bool:
        """Try `action`; it must fail with one of the named errors (`"EPERM ENOENT"`). Returns whether it did."""
        try:
            result = action(*arguments)
        except TimeoutError:
            raise
        except ChildProcessError as error:  # of in_child: a filter that kills has refused as well
            if "SIGSYS" not in str(error):
                raise
            self.stopped(f"{what}: SIGSYS")
            return True
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error))
            if name in names.split():
                self.stopped(f"{what}: {name}")
                return True
            self.surprises.append(f"{what}: {name}, where {' or '.join(names.split())} was expected")
            return False
        if isinstance(result, int) and not isinstance(result, bool) and 2 < result < 1 << 20:  # noqa: PLR2004  # a descriptor
            with contextlib.suppress(OSError):
                os.close(result)
        self.breach(f"{what}: succeeded" + (f" ({result!r:.200})" if isinstance(result, str | bytes) else ""))
        return False

    def works(self, what: str, held: bool) -> None:
        """Insist that legitimate work succeeds; for twins.

        Raises:
            RuntimeError: it does not.
        """
        if not held:
            raise RuntimeError(what)

    def http(self, request: bytes, wait_s: float = 3.0) -> bytes:
        """Send bytes to the proxy; return what comes back until it closes or is silent."""
        with socket.create_connection(PROXY, timeout=wait_s) as connection:
            connection.sendall(request)
            return _read_head(connection, wait_s)

    def proxy_refuses(self, what: str, request: bytes) -> None:
        """Send a request that the proxy must not carry out."""
        try:
            answer = self.http(request)
        except ConnectionError as error:
            self.stopped(f"{what}: {type(error).__name__}")
            return
        except TimeoutError:
            self.surprises.append(f"{what}: no answer")
            return
        self._judge_http(what, answer)

    def _judge_http(self, what: str, answer: bytes) -> None:
        line = answer.split(b"\r\n", 1)[0].decode("latin-1")[:80]
        reason = _header(answer, b"x-cloister-reason")
        parts = line.split(" ")
        if not answer:
            self.stopped(f"{what}: connection closed")
        elif len(parts) < 2 or not parts[1].isdigit():  # noqa: PLR2004  # version and status
            self.surprises.append(f"{what}: answered {line!r}")
        elif parts[1].startswith(("1", "2", "3")) or reason in DIALLED:
            self.breach(f"{what}: {line} {reason}")
        else:
            self.stopped(f"{what}: {parts[1]} {reason}".rstrip())

    def socks(self, what: str, address: bytes, port: int) -> None:
        """Ask the proxy by SOCKS5 (RFC 1928) for a target that it must refuse; `address` begins with its type."""
        try:
            with socket.create_connection(PROXY, timeout=3.0) as connection:
                connection.sendall(b"\x05\x01\x00")
                if connection.recv(2) != b"\x05\x00":
                    self.surprises.append(f"{what}: the proxy speaks no SOCKS5")
                    return
                connection.sendall(b"\x05\x01\x00" + address + struct.pack("!H", port))
                reply = connection.recv(10)
        except ConnectionError as error:
            self.stopped(f"{what}: {type(error).__name__}")
            return
        except TimeoutError:
            self.surprises.append(f"{what}: no answer")
            return
        if not reply:
            self.stopped(f"{what}: connection closed")
        elif len(reply) < 2 or reply[1] in (0, 1, 3, 4, 5, 6):  # noqa: PLR2004  # granted, or refused by the network
            self.breach(f"{what}: SOCKS reply {reply[1:2].hex()}")
        else:
            self.stopped(f"{what}: SOCKS reply {reply[1]:#04x}")

    def connects(self, what: str, names: str, family: int, kind: int, target: Any) -> None:
        """Try a direct connection or datagram that must be refused; silence means that a packet left."""
        try:
            self.refused(what, names, _connect, family, kind, target)
        except TimeoutError:
            self.breach(f"{what}: no answer, so packets leave")


def _connect(family: int, kind: int, target: Any) -> None:
    with socket.socket(family, kind) as sock:
        sock.settimeout(1.0)
        if kind == socket.SOCK_DGRAM:
            sock.sendto(b"cloister-prove", target)
        else:
            sock.connect(target)


def _read_head(connection: socket.socket, wait_s: float) -> bytes:
    """Read until the end of a response's head, its close, or the time is over; a short body comes along."""
    data = b""
    deadline = time.monotonic() + wait_s
    while b"\r\n\r\n" not in data and len(data) < 65536:  # noqa: PLR2004  # more than any head of ours
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        chunk = connection.recv(4096)
        if not chunk:
            break
        data += chunk
    return data


def _header(answer: bytes, name: bytes) -> str:
    for line in answer.split(b"\r\n\r\n", 1)[0].split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().decode("latin-1")
    return ""


@contextlib.contextmanager
def scratch(path: str) -> Iterator[str]:
    """Lend a path that is removed afterwards, whatever it became."""
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path) if os.path.islink(path) or not os.path.isdir(path) else os.rmdir(path)


def write(path: str, text: str = "attack\n") -> None:
    """Write a file, following links as a program would."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def append(path: str, text: str = "# attack\n") -> None:
    """Append to a file that exists or is made."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def opens(path: str) -> None:
    """Open what holds secrets and look at nothing: a breach must not put them into the report."""
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def read(path: str, size: int = 400) -> str:
    """Return the beginning of a file: a canary in it is seen by the host when it is reported."""
    with open(path, "rb") as file:
        return file.read(size).decode("latin-1")
