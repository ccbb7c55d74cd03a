"""Linters as tests: ruff, mypy, the import contracts, C warnings, shell syntax, man pages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-D_FORTIFY_SOURCE=2")
BPF_FLAGS = (
    "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
    "-Wno-gnu-variable-sized-type-not-at-end",
)  # fmt: skip
"""As in hatch_build.py; a program has the parameters of its hook, whether it uses them or not."""
BPF_MACHINES = {"x86_64": "x86", "aarch64": "arm64"}


def _run(root: Path, *command: str, **variables: str) -> str:
    """Return the output of a command that must succeed."""
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _program(name: str) -> str:
    """Return a tool of the virtual environment, which may not be on PATH."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed"
    return found


def test_ruff_has_no_complaint(root: Path) -> None:
    """All rules of ruff hold; each exception has its reason in pyproject.toml or on its line."""
    _run(root, _program("ruff"), "check", "--no-cache", ".")


def test_the_code_is_formatted(root: Path) -> None:
    """The formatter would change nothing."""
    _run(root, _program("ruff"), "format", "--no-cache", "--check", "src", "tests", "tools")


def test_types_hold(root: Path, tmp_path: Path) -> None:
    """Mypy accepts the product in strict mode."""
    _run(root, sys.executable, "-m", "mypy", f"--cache-dir={tmp_path}")


def test_rooms_import_only_downwards(root: Path) -> None:
    """The import contracts of ARCHITECTURE.md hold, and every room has its place in them."""
    _run(root, _program("lint-imports"), "--no-cache", PYTHONPATH=str(root / "src"))


def test_c_compiles_without_warnings(root: Path, tracked: list[Path], tmp_path: Path) -> None:
    """Every C file of the product compiles with -Wall -Wextra -Werror."""
    for path in tracked:
        if path.suffix != ".c" or (root / "src") not in path.parents:
            continue
        if path.name.endswith(".bpf.c"):
            machine = os.uname().machine
            target = [f"-I/usr/include/{machine}-linux-gnu", f"-D__TARGET_ARCH_{BPF_MACHINES[machine]}"]
            _run(root, "clang", *BPF_FLAGS, *target, "-c", str(path), "-o", str(tmp_path / "out.o"))
        else:
            _run(root, "cc", *FLAGS, "-c", str(path), "-o", str(tmp_path / "out.o"))


def test_shell_scripts_are_strict(root: Path, text_files: dict[Path, str]) -> None:
    """Every shell script parses, and stops at the first error and at unset variables."""
    scripts = [
        path for path, text in text_files.items() if path.suffix == ".sh" or text.startswith("#!/usr/bin/env bash")
    ]
    assert len(scripts) > 5
    for path in scripts:
        _run(root, "bash", "-n", str(path))
        text = text_files[path]
        assert "set -euo pipefail" in text or "/common.sh" in text or "/fresh.sh" in text, path


def test_man_pages_build_without_warnings(root: Path, tracked: list[Path]) -> None:
    """Groff formats every man page without a warning."""
    for path in tracked:
        if path.parent == root / "docs" / "man" and path.suffix[1:].isdigit():
            assert _run(root, "groff", "-man", "-ww", "-z", str(path)) == "", path
