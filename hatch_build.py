"""Build hook: compile what is not Python into the wheel.

- the static helper `cloister-shim`: needs a C compiler and a static libc (gcc and libc6-dev on Debian). Without them
  the build stops: every backend needs the shim, and a wheel without it would only fail later.
- the kernel side of the audit: BPF programs, and two extensions for Python's stable ABI, so that one wheel serves all
  versions. They need clang, llvm, libbpf-dev, libelf-dev and python3-dev. CLOISTER_BUILD_AUDIT says what happens
  where these are missing: `auto` builds a wheel without kernel events and says so, `required` fails, `off` does not
  try.

`python hatch_build.py` builds in place, for working in a checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIM = Path("src/cloister/host/shim")
NATIVE = Path("src/cloister/host/native")
BPF = Path("src/cloister/audit/bpf")
FLAGS = [
    "-std=gnu11",
    "-Os",  # every run maps it: small before quick
    "-ffunction-sections",
    "-fdata-sections",
    "-Wl,--gc-sections",
    "-static-pie",
    "-fPIE",
    "-s",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    "-D_FORTIFY_SOURCE=2",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
]
EXTENSION_FLAGS = [
    "-std=gnu11",
    "-O2",
    "-shared",
    "-fPIC",
    "-s",
    "-Wall",
    "-Wextra",
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
]
BPF_FLAGS = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
             "-Wno-gnu-variable-sized-type-not-at-end"]  # fmt: skip
PACKAGES = "clang llvm libbpf-dev libelf-dev python3-dev"
MACHINES = {"x86_64": "x86", "aarch64": "arm64"}
EXTENSIONS = {
    # Name: declarations, sources, libraries. The reader needs no libbpf: the keeper of the log runs without it.
    "_audit": ("audit_api.h", ("reader.c", "events.c", "json.c", "chain.c", "sha256.c"), ()),
    "_bpf": ("bpf_api.h", ("loader.c",), ("-lbpf",)),
}


class BuildHook(BuildHookInterface):
    """Compile every C file of `host/shim` into one static program, and the audit's kernel side."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files are collected; the wheel is then no longer pure Python."""
        del version
        root = Path(self.root)
        build_shim(root)
        native = build_audit(root, os.environ.get("CLOISTER_BUILD_AUDIT") or "auto")
        build_data["pure_python"] = False
        # Not for one Python: the helper is static, and the extensions use the stable ABI. One wheel serves all.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}" if native else f"py3-none-{platform}"


def build_shim(root: Path) -> None:
    """Compile the static helper."""
    target = root / SHIM / "cloister-shim"
    sources = sorted(str(path) for path in (root / SHIM).glob("*.c"))
    partial = target.with_suffix(".tmp")
    _run([os.environ.get("CC", "cc"), *FLAGS, "-o", str(partial), *sources])
    partial.replace(target)


def build_audit(root: Path, wanted: str) -> bool:
    """Build programs and extensions; return whether they are there. What an earlier build left is removed first.

    Raises:
        SystemExit: they are required, and something is missing.
    """
    built = [*(root / BPF).glob("*.bpf.o"), *(root / NATIVE.parent).glob("_*.abi3.so")]
    for path in built:
        path.unlink()
    if wanted == "off":
        return False
    try:
        for source in sorted((root / BPF).glob("*.bpf.c")):
            _build_program(source)
        for name in EXTENSIONS:
            _build_extension(root, name)
    except (OSError, ImportError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        for path in [*(root / BPF).glob("*.bpf.o"), *(root / NATIVE.parent).glob("_*.abi3.so")]:
            path.unlink()
        if wanted == "required":
            raise SystemExit(f"the kernel side of the audit does not build: {said}") from error
        first = said.strip().splitlines()[0]
        sys.stderr.write(f"this wheel has no kernel events: {first}\n  apt-get install {PACKAGES}, then build again\n")
        return False
    return True


def _build_program(source: Path) -> None:
    """Compile one BPF object for this machine; its debugging information goes, its BTF stays."""
    machine = os.uname().machine
    target_flag = f"-D__TARGET_ARCH_{MACHINES.get(machine, machine)}"
    target = source.with_suffix(".o")
    partial = source.with_suffix(".tmp")
    include = f"-I/usr/include/{machine}-linux-gnu"
    _run(["clang", *BPF_FLAGS, target_flag, include, "-c", str(source), "-o", str(partial)])
    _run(["llvm-strip", "-g", str(partial)])
    partial.replace(target)


def _build_extension(root: Path, name: str) -> None:
    from cffi import FFI  # only where the audit is built

    declarations, sources, libraries = EXTENSIONS[name]
    folder = root / NATIVE
    builder = FFI()
    builder.cdef((folder / declarations).read_text(encoding="utf-8"))
    include = f'#include <stdint.h>\n#include <stddef.h>\n#include "{declarations}"\n'
    if "-lbpf" in libraries:
        include = "#include <bpf/bpf.h>\n#include <bpf/libbpf.h>\n" + include
    builder.set_source(f"cloister.host.{name}", include)
    generated = folder / f"{name}.tmp.c"
    target = folder.parent / f"{name}.abi3.so"
    partial = target.with_suffix(".tmp")
    try:
        builder.emit_c_code(str(generated))
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{folder}"]
        files = [str(generated), *(str(folder / source) for source in sources)]
        _run([os.environ.get("CC", "cc"), *EXTENSION_FLAGS, *includes, "-o", str(partial), *files, *libraries])
        partial.replace(target)
    finally:
        generated.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    build_shim(here)
    build_audit(here, "required")
