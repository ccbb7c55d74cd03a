"""Build hook: compile the static helper `cloister-shim` into the wheel.

Needs a C compiler and a static libc (gcc and libc6-dev on Debian). Without them the build
stops: every backend needs the shim, and a wheel without it would only fail later.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIM = Path("src/cloister/host/shim")
FLAGS = [
    "-std=gnu11",
    "-O2",
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


class ShimHook(BuildHookInterface):
    """Compile every C file of `host/shim` into one static program."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files are collected; the wheel is then no longer pure Python."""
        del version
        root = Path(self.root) / SHIM
        target = root / "cloister-shim"
        sources = sorted(str(path) for path in root.glob("*.c"))
        compiler = os.environ.get("CC", "cc")
        partial = target.with_suffix(".tmp")
        subprocess.run([compiler, *FLAGS, "-o", str(partial), *sources], check=True)
        partial.replace(target)
        build_data["pure_python"] = False
        # Not for one Python: the helper is static, and nothing links against an interpreter. One wheel serves all.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
