"""A guest under test: QEMU with the argv of the product, a console that is read, and our end of the channel.

No jail and no keeper: what is tested with it is the guest and the machine's argv. Everything is ended with the test.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from cloister.images.manifest import Manifest
from cloister.isolation.qemu import Machine, clock_khz, command_line, qemu_argv
from cloister.plan.vm import CHANNEL_FD, CONSOLE_FD, FIRST_FILE

TEMPLATE = "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests random.trust_cpu=on {verity} {clock}"
PATIENCE = 60.0
"""Seconds for whatever a guest does; alone it needs one."""
MEMORY_MIB = 256
_WIRE_FD = 30


class GuestImage(Protocol):
    """The tests' image (tests/microvm/conftest.py), as far as it matters here."""

    @property
    def path(self) -> Path:
        """Its directory."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What is signed."""
        ...


class Image(NamedTuple):
    """What a guest starts from. `verity` is the table as on the command line."""

    kernel: Path
    initramfs: Path
    root: Path
    verity: str


def of(image: GuestImage) -> Image:
    """Return the parts of the tests' image."""
    path, root = image.path, image.manifest.root
    verity = f"{root.data_blocks}:{root.hash_start}:{root.root_hash}:{root.salt}"
    return Image(path / "vmlinux", path / "initramfs.cpio", path / "root.img", verity)


def line(image: Image, *, verity: str | None = None, more: str = "", clock: bool = True) -> str:
    """Return a command line; `verity` replaces the whole word, `more` stands at the end."""
    khz = clock_khz(Path("/proc/cpuinfo").read_text()) if clock else 0
    word = f"cloister.verity={image.verity}" if verity is None else verity
    return f"{command_line(TEMPLATE, verity=word, clock_khz=khz)} {more}".strip()


class GuestMachine:
    """One QEMU process. Use it as a context manager."""

    def __init__(
        self,
        image: Image,
        cmdline: str,
        disks: Mapping[str, Path] | None = None,
        *,
        writable_root: bool = False,
        mac: str = "",
    ) -> None:
        """Start it.

        Args:
            image: what it starts from.
            cmdline: of the kernel.
            disks: files of the roles var and workspace.
            writable_root: what no launcher of ours would do.
            mac: of a network card whose other end is `wire`, a socket with one frame in each message.
        """
        self.console = b""
        self.started = time.monotonic()
        paths = {"kernel": image.kernel, "initramfs": image.initramfs, "root": image.root, **(disks or {})}
        numbers = {role: FIRST_FILE + index for index, role in enumerate(paths)}
        program = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
        machine = Machine(
            program=program, accelerator="tcg", memory_mib=MEMORY_MIB, cpus=1, files=numbers, cmdline=cmdline
        )
        argv = qemu_argv(machine)
        if writable_root:
            argv = tuple(word.replace("read-only=on", "read-only=off") for word in argv)
        self.channel, theirs = socket.socketpair()
        self._output, console = os.pipe()
        written = {"var", "workspace", *({"root"} if writable_root else ())}
        placed = {numbers[role]: os.open(path, _flags(role in written)) for role, path in paths.items()}
        placed |= {CHANNEL_FD: theirs.fileno(), CONSOLE_FD: console}
        self.wire, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        if mac:
            placed[_WIRE_FD] = far.fileno()
            argv += ("-netdev", f"dgram,id=net,local.type=fd,local.str={_WIRE_FD}")
            argv += ("-device", f"virtio-net-device,netdev=net,mac={mac}")
        try:
            self.process = _spawn(argv, placed, console)
        finally:
            for number, descriptor in placed.items():
                if number not in {CHANNEL_FD, CONSOLE_FD, _WIRE_FD}:
                    os.close(descriptor)
            far.close()
            theirs.close()
            os.close(console)

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.channel.close()
        self.wire.close()
        os.close(self._output)

    def wait_for(self, text: str, seconds: float = PATIENCE) -> float:
        """Read the console until it holds `text`: seconds since the start.

        Raises:
            AssertionError: it did not come, or the machine ended before.
        """
        until = time.monotonic() + seconds
        while text.encode() not in self.console:
            if not self._read(until):
                raise AssertionError(f"no {text!r} on the console:\n{self.text}")
        return time.monotonic() - self.started

    def ended(self, seconds: float = PATIENCE) -> str:
        """Wait for the end of the machine: all it printed."""
        until = time.monotonic() + seconds
        while self._read(until):
            pass
        left = max(0.1, until - time.monotonic())
        self.process.wait(left)
        return self.text

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.console.decode(errors="replace")

    def _read(self, until: float) -> bool:
        left = until - time.monotonic()
        if left <= 0 or not select.select([self._output], [], [], left)[0]:
            return False
        data = os.read(self._output, 65536)
        self.console += data
        return bool(data)


def _flags(written: bool) -> int:
    return (os.O_RDWR if written else os.O_RDONLY) | os.O_CLOEXEC


def _spawn(argv: tuple[str, ...], placed: dict[int, int], console: int) -> subprocess.Popen[bytes]:
    """Start QEMU with descriptors at their numbers: through a shell, which places them without a fork hook."""
    # Out of the way of all target numbers first.
    high = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100) for number, descriptor in placed.items()}
    words = " ".join(f"{number}<&{descriptor} {descriptor}<&-" for number, descriptor in high.items())
    try:
        return subprocess.Popen(
            ["/bin/bash", "-c", f'exec {words}; exec "$@"', "bash", *argv],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, pass_fds=tuple(high.values()),
        )  # fmt: skip
    finally:
        for descriptor in high.values():
            os.close(descriptor)
