"""Compile the shim for tests: with the flags of the wheel, and once more with sanitizers.

Not the build of the product: `hatch_build.py` is, and the flags come from there.
"""

from __future__ import annotations

import ast
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src/cloister/host/shim"
SANITIZE = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]  # fmt: skip


def _wheel_flags() -> list[str]:
    """Return FLAGS of `hatch_build.py`, read without importing it: hatchling need not be installed."""
    for node in ast.parse((ROOT / "hatch_build.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FLAGS":
            flags: list[str] = ast.literal_eval(node.value)
            return flags
    raise LookupError("hatch_build.py has no FLAGS")


def _compile(target: Path, flags: list[str], main: Path | None = None) -> Path:
    """Compile when a source is newer than `target`; the new file replaces the old one in one step.

    With `main`, that file stands in the place of the shim's own `main.c`.
    """
    inputs = [*SOURCES.glob("*.[ch]"), ROOT / "hatch_build.py", Path(__file__), *([main] if main else [])]
    newest = max(path.stat().st_mtime_ns for path in inputs)
    if target.exists() and target.stat().st_mtime_ns >= newest:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".shim-")
    os.close(handle)
    sources = sorted(str(path) for path in SOURCES.glob("*.c") if not (main and path.name == "main.c"))
    if main:
        sources += [str(main), "-I", str(SOURCES)]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", partial, *sources], check=True)
    Path(partial).chmod(0o755)
    Path(partial).replace(target)
    return target


def shim() -> Path:
    """Return the shim where the product looks for it, compiled from the present sources."""
    return _compile(SOURCES / "cloister-shim", _wheel_flags())


def sanitized_shim() -> Path:
    """Return a shim that aborts on every memory error and undefined behaviour (gcc's ASan and UBSan)."""
    return _compile(ROOT / "build/shim/cloister-shim-sanitized", SANITIZE)


def guest_alone() -> Path:
    """Return the guest's end of the link as a program that needs no machine."""
    return _compile(ROOT / "build/shim/guest-alone", _wheel_flags(), ROOT / "tests/kernel/guest_alone.c")


def sanitized_guest_alone() -> Path:
    """Return the same, which aborts on every memory error and undefined behaviour."""
    return _compile(ROOT / "build/shim/guest-alone-sanitized", SANITIZE, ROOT / "tests/kernel/guest_alone.c")


if __name__ == "__main__":
    print(shim())  # noqa: T201 - `python tests/shim_build.py` is the command-line form
