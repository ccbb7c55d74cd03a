"""What the style tests share: the tracked files of the project."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.style)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the top of the project."""
    return ROOT


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Return every tracked file, and those not tracked yet that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=30)
    paths = (ROOT / name for name in done.stdout.decode().split("\0") if name)
    return sorted(path for path in paths if path.is_file())


@pytest.fixture(scope="session")
def python_files(tracked: list[Path]) -> list[Path]:
    """Return the Python modules."""
    return [path for path in tracked if path.suffix == ".py"]


@pytest.fixture(scope="session")
def text_files(tracked: list[Path]) -> dict[Path, str]:
    """Return every tracked file that is text, with its content."""
    found = {}
    for path in tracked:
        try:
            found[path] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found
