"""A virtual machine for one piece of work: boots the image of tools/vm-image, hands it files, takes back what came.

Emulated (TCG), so it needs no privileges and no hardware, and is ten to thirty times slower than
this machine. It has no network. The image stays as it is: writes go to a temporary file.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

_OUTPUT_BYTES = 16 << 20
_ROOM_BYTES = 8 << 30
"""For /tmp: sparse, and gone with the machine."""
_EMULATED = ("-accel", "tcg,thread=multi,tb-size=512", "-cpu")
# QEMU 7.2 spoils the flags of CMPXCHG16B now and then, of which Linux 6.12 dies in its memory allocator.
_PLAIN = (*_EMULATED, "max,cx16=off")
_VIRTUALIZES = (*_EMULATED, "max,cx16=off,vendor=AuthenticAMD,svm=on,npt=on")
_APPEND = (
    "console=ttyS0 root=/dev/vda rw quiet loglevel=3 systemd.show_status=0 random.trust_cpu=on mitigations=off nokaslr "
    "panic=-1"
)
# With SVM a processor of QEMU 7.2 sleeps through a call of another one now and then, which waits for ever: none sleeps.
_SLEEPLESS = "idle=poll"


class Came(NamedTuple):
    """What came of the work."""

    status: int
    output: str
    files: dict[str, bytes]
    console: str


def work(image: Path, tree: Path, scratch: Path, timeout_s: float, *, virtualizes: bool = False) -> Came:
    """Boot, unpack `tree` at /srv/work in the guest, run its program `start` as root, and power off.

    With `virtualizes` its processors have SVM, which QEMU emulates whatever this host's are: with KVM in the guest, a
    guest of the guest is four times as quick as one that is emulated by what is emulated itself.

    `start` leaves files in /srv/out. The machine is killed when this is interrupted, or after the time.

    Raises:
        AssertionError: nothing came back in time; holds the console's last lines.
    """
    parcel, results, room = scratch / "work.tar", scratch / "results.tar", scratch / "room.img"
    with tarfile.open(parcel, "w") as tar:
        tar.add(tree, ".")
    for path, size in ((results, _OUTPUT_BYTES), (room, _ROOM_BYTES)):
        with path.open("wb") as file:
            file.truncate(size)
    console = scratch / "console.log"
    with console.open("wb") as log:
        machine = subprocess.Popen(
            _argv(image, (parcel, results, room), virtualizes=virtualizes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=scratch,
        )
        try:
            machine.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass  # told below, by what did not come back
        finally:
            machine.kill()
            machine.wait()
            room.unlink()
    said = console.read_bytes().decode("utf-8", "replace")
    try:
        with tarfile.open(results) as tar:
            found = {name: _content(tar, name) for name in tar.getnames()}
        return Came(int(found["./status"]), found["./output"].decode("utf-8", "replace"), found, said)
    except (tarfile.TarError, KeyError) as error:
        raise AssertionError(f"the machine gave no results within {timeout_s:g} s\n{said[-4000:]}") from error


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    return (file or io.BytesIO()).read()


def _argv(image: Path, files: tuple[Path, Path, Path], *, virtualizes: bool) -> list[str]:
    """Return QEMU's command: two processors, four disks, a console, and nothing else."""
    parcel, results, room = files
    processors, append = (_VIRTUALIZES, f"{_APPEND} {_SLEEPLESS}") if virtualizes else (_PLAIN, _APPEND)
    disks = (
        (image / "root.img", "snapshot=on"),
        (parcel, "readonly=on"),
        (results, "readonly=off"),
        (room, "cache=unsafe"),
    )
    argv = [
        "qemu-system-x86_64", *processors, "-machine", "q35", "-smp", "2",
        "-m", "1536", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-monitor", "none",
        "-serial", "stdio", "-device", "virtio-rng-pci", "-kernel", str(image / "vmlinuz"),
        "-initrd", str(image / "initrd.img"), "-append", append,
    ]  # fmt: skip
    for number, (path, options) in enumerate(disks):
        argv += ["-drive", f"id=disk{number},if=none,format=raw,file={path},{options}"]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    return argv
