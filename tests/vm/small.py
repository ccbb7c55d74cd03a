"""A guest of one program: Debian's kernel, an initramfs made here of what this machine has, a console that answers.

Smaller and quicker than the machine of `machine.py` (no systemd, no disk): for what only needs another kernel.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t securityfs security /sys/kernel/security
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t tmpfs tmp /tmp
export PYTHONPATH=/packages PYTHONDONTWRITEBYTECODE=1 PYTHONHOME={prefix}
echo "=== begin"
{python} -S /program.py 2>&1
echo "=== end $?"
echo o >/proc/sysrq-trigger
sleep 60
"""
_LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "site-packages", "dist-packages",
             "__pycache__", "turtledemo", "pydoc_data", "unittest", "distutils"}  # fmt: skip
_PACKAGES = ("cffi", "msgspec", "cloister")


def run(  # noqa: PLR0913  # all of a machine
    kernel: Path, program: Path, more: dict[str, Path], scratch: Path, timeout_s: float,
    machine: tuple[str, ...] = ("-accel", "tcg,thread=multi", "-smp", "2"),
) -> tuple[int, str]:  # fmt: skip
    """Boot, run a Python program as root, return its status and what it printed.

    Raises:
        AssertionError: it did not end in time; with the console's end.
    """
    image = scratch / "initramfs.gz"
    image.write_bytes(gzip.compress(_archive(program, more), 1))
    argv = [
        "qemu-system-x86_64", *machine, "-cpu", "max", "-m", "1024", "-nodefaults",
        "-no-user-config", "-nographic", "-no-reboot", "-monitor", "none", "-serial", "stdio", "-kernel", str(kernel),
        "-initrd", str(image), "-append",
        "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr rdinit=/init",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s,
            check=False,
        )  # fmt: skip
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
    found = re.search(r"=== begin\r?\n(.*)=== end (\d+)", said, re.DOTALL)
    assert found, f"the guest did not end\n{said[-4000:]}"
    return int(found[2]), found[1].replace("\r", "")


def _archive(program: Path, more: dict[str, Path]) -> bytes:
    """Return a cpio archive (newc, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    python = os.path.realpath(sys.executable)
    stdlib = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path | bytes] = {
        "/init": _INIT.format(python=python, prefix=sys.base_prefix).encode(), "/program.py": program, **more,
        "/bin/sh": Path("/bin/sh"), "/bin/mount": Path("/bin/mount"), "/bin/sleep": Path("/bin/sleep"),
        python: Path(python),
    }  # fmt: skip
    for path in _below(stdlib):
        files[str(path)] = path
    for package in _PACKAGES:
        folder = Path(sys.modules[package].__file__ or "").parent
        for path in _below(folder):
            files[f"/packages/{path.relative_to(folder.parent)}"] = path
        for path in folder.parent.glob(f"_{package}_backend*.so"):
            files[f"/packages/{path.name}"] = path
    for library in _libraries(path for path in files.values() if isinstance(path, Path)):
        files[library] = Path(os.path.realpath(library))
    return _newc(files)


def _below(folder: Path) -> Iterable[Path]:
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        yield from (Path(top) / name for name in names if name.endswith((".py", ".so", ".o", ".toml", ".txt")))


def _libraries(paths: Iterable[Path]) -> set[str]:
    """Return the shared libraries that programs and extensions name, as ldd(1) finds them."""
    wanted = [str(path) for path in paths if path.suffix not in {".py", ".o"} and _is_program(path)]
    said = subprocess.run(["ldd", *wanted], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(?:=> )?(/\S+\.so\S*) \(", said))


def _is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _newc(files: dict[str, Path | bytes]) -> bytes:
    entries: list[tuple[str, int, bytes]] = []
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"/"}
    folders |= {"/proc", "/sys", "/tmp", "/dev", "/etc"}
    entries += [(name, 0o40755, b"") for name in sorted(folders)]
    for name, content in files.items():
        entries.append((name, 0o100755, content if isinstance(content, bytes) else content.read_bytes()))
    entries.append(("TRAILER!!!", 0, b""))
    packed = bytearray()
    for number, (name, mode, content) in enumerate(entries):
        label = name.lstrip("/").encode() + b"\0"
        fields = (number + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(label), 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields) + label
        packed += b"\0" * (-len(packed) % 4) + content
        packed += b"\0" * (-len(packed) % 4)
    return bytes(packed)
