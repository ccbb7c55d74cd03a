"""The wheel for other machines: what the loader of BPF programs needs is inside.

It is loaded in a root of its own, which has this Python and the libraries it links, and neither libbpf nor libelf. The
wheel as it was built does not load there, so the place itself is tried.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import _cffi_backend
import pytest

ROOT = Path(__file__).parents[2]
LOAD = """
import pathlib, re, sys
from cloister.host import kernel_programs
try:
    ffi, lib = kernel_programs._native()
except ImportError as error:
    sys.exit(str(error))
image = pathlib.Path(kernel_programs.__file__).parents[1].joinpath("audit/bpf/process.bpf.o").read_bytes()
opened = lib.loader_open(image, len(image))
first = lib.bpf_object__next_program(opened, ffi.NULL)
print(ffi.string(lib.bpf_program__name(first)).decode())
print(*sorted(set(re.findall(r"/\\S*lib(?:bpf|elf)\\S*", open("/proc/self/maps").read()))))
"""

pytestmark = [pytest.mark.slow, pytest.mark.kernel]


def _linked(site: Path) -> list[str]:
    """Return the libraries of this Python and its extensions, and what manylinux lets wheels rely on (zlib)."""
    own = sorted(str(path) for path in Path(sysconfig.get_path("platstdlib")).glob("lib-dynload/*.so"))
    own += [str(path) for path in site.glob("cloister.libs/*.so*")]
    own += [_cffi_backend.__file__]
    said = subprocess.run(["ldd", os.path.realpath(sys.executable), *own], capture_output=True, text=True, check=True)
    found = set(re.findall(r"(/\S+\.so\S*) \(0x", said.stdout)).difference(own)
    return sorted(path for path in found if not Path(path).name.startswith(("libbpf", "libelf")))


def _load(site: Path) -> subprocess.CompletedProcess[str]:
    """Load the extension in a root with nothing but Python."""
    python = os.path.realpath(sys.executable)
    library = sysconfig.get_path("stdlib")
    root = ["--unshare-all", "--proc", "/proc", "--ro-bind", python, python, "--ro-bind", library, library]
    for path in _linked(site):
        root += ["--ro-bind", path, path]
    # cffi's backend, as any installation has it.
    paths = [str(site), *(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))]
    for path in paths:
        root += ["--ro-bind", path, path]
    command = ["bwrap", *root, "--clearenv", "--setenv", "PYTHONPATH", ":".join(paths), python, "-B", "-c", LOAD]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _installed(wheel: Path, target: Path) -> Path:
    """Install a wheel alone, as pip checks it."""
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True, timeout=60)
    return target


def test_the_wheel_for_other_machines_brings_libbpf_along(tmp_path: Path) -> None:
    """Where no libbpf is installed the bundled wheel reads BPF objects; the plain one names what it misses."""
    plain = next(Path(os.environ["CLOISTER_TEST_WHEEL"]).glob("*.whl"))
    bundle = [sys.executable, str(ROOT / "tools/bundle_libraries.py"), str(plain), str(tmp_path)]
    made = Path(subprocess.run(bundle, stdout=subprocess.PIPE, text=True, check=True, timeout=100).stdout.strip())
    assert re.fullmatch(r"cloister-\S+-cp311-abi3-manylinux_2_\d+_\w+\.whl", made.name)

    without = _load(_installed(plain, tmp_path / "plain"))
    site = _installed(made, tmp_path / "bundled")
    loaded = _load(site)

    assert without.returncode != 0
    assert "libbpf.so" in without.stderr
    assert loaded.returncode == 0, loaded.stderr
    program, *libraries = loaded.stdout.split()
    assert program.startswith("process_")
    assert len(libraries) == 2
    assert all(path.startswith(f"{site}/cloister.libs/") for path in libraries)
    assert {path.stem for path in site.glob("*.dist-info/licenses/*.txt")} >= {"libbpf", "libelf"}
