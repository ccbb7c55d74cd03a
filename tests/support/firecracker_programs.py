"""The programs that stand in for Firecracker and its jailer, each packed into one file that needs only /usr."""

from __future__ import annotations

import shutil
import zipapp
from pathlib import Path

_HERE = Path(__file__).parent
_INTERPRETER = "/usr/bin/python3 -I"


def install_jailer(directory: Path) -> Path:
    """Make `jailer` in a directory, and return its path."""
    target = directory / "jailer"
    text = (_HERE / "firecracker_jailer_alike.py").read_text(encoding="utf-8")
    target.write_text(f"#!{_INTERPRETER}\n{text}", encoding="utf-8")
    target.chmod(0o755)
    return target


def install(directory: Path, name: str = "firecracker", *, twist: str = "") -> Path:
    """Make `firecracker` in a directory, and return its path; `twist` is code of one that was taken over."""
    tree = directory / f".{name}"
    shutil.copytree(_HERE / "firecracker_alike", tree / "firecracker_alike", ignore=shutil.ignore_patterns("*.pyc"))
    begin = "import sys\nfrom firecracker_alike.__main__ import main\n"
    (tree / "__main__.py").write_text(f"{begin}{twist}\nsys.exit(main())\n")
    target = directory / name
    zipapp.create_archive(tree, target, interpreter=_INTERPRETER)
    shutil.rmtree(tree)
    target.chmod(0o755)
    return target
