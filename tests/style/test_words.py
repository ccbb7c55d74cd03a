"""Words: captions and docstrings everywhere, no unfinished work, no address or path of one machine."""

import ast
import re
from itertools import pairwise
from pathlib import Path

# Put together here, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b")
REGISTRIES = ("registry." + "npmjs", "files." + "pythonhosted", "pypi." + "org", "deb." + "debian", "--index" + "-url ")
MAY_NAME_UNFINISHED = {"pyproject.toml"}


def test_every_module_has_a_caption(root: Path, python_files: list[Path]) -> None:
    """Every module opens with what it is; only files of tests may be shorter than a sentence."""
    bare = [
        str(path.relative_to(root))
        for path in python_files
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]

    assert not bare


def test_every_test_states_its_promise(root: Path, python_files: list[Path]) -> None:
    """Every test has a docstring."""
    silent = []
    for path in python_files:
        if not path.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
            if is_test and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(root)}:{node.name}")

    assert not silent


def test_everything_public_is_described(root: Path, python_files: list[Path]) -> None:
    """Every public function and class of the product has a docstring."""
    bare = []
    for path in python_files:
        if (root / "src") not in path.parents:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        scopes: list[ast.Module | ast.ClassDef] = [tree, *classes]
        for node in (child for scope in scopes for child in scope.body):
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node) and not _overrides(node):
                bare.append(f"{path.relative_to(root)}:{node.name}")

    assert not bare


def _overrides(node: ast.stmt) -> bool:
    """Tell whether a method is marked as an override, whose description stands in the base class."""
    marks = getattr(node, "decorator_list", [])
    return any(getattr(mark, "id", getattr(mark, "attr", "")) in {"override", "overload"} for mark in marks)


def test_nothing_is_unfinished(root: Path, text_files: dict[Path, str]) -> None:
    """No file carries a note that something is still to be done."""
    found = [
        f"{path.relative_to(root)}:{number}"
        for path, text in text_files.items()
        if path.name not in MAY_NAME_UNFINISHED
        for number, line in enumerate(text.splitlines(), start=1)
        if UNFINISHED.search(line)
    ]

    assert not found


def test_no_download_address_is_recorded(root: Path, text_files: dict[Path, str]) -> None:
    """Lock files and scripts name packages, never the host they came from."""
    found = [
        str(path.relative_to(root)) for path, text in text_files.items() if any(host in text for host in REGISTRIES)
    ]

    assert not found
    assert '"resolved"' not in text_files[root / "tests/agents/package-lock.json"]


def test_no_path_of_one_machine_is_recorded(root: Path, text_files: dict[Path, str]) -> None:
    """No file names the folder in which this checkout lies."""
    found = [str(path.relative_to(root)) for path, text in text_files.items() if f"{root}/" in text]

    assert not found


def test_locks_pin_every_package_by_hash(root: Path) -> None:
    """Every requirement of the lock files has one version and at least one hash."""
    for name in ("runtime", "dev"):
        text = (root / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        blocks = re.split(r"\n(?=[a-z])", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).strip())
        assert len(blocks) >= 3
        for block in blocks:
            assert re.match(r"[a-z0-9._-]+==\S+", block), block.splitlines()[0]
            assert "--hash=sha256:" in block, block.splitlines()[0]


def test_test_modules_have_names_of_their_own(python_files: list[Path]) -> None:
    """Pytest imports test modules by their bare names (`prepend`), so two of one name cannot run together."""
    names = sorted(path.name for path in python_files if path.name.startswith("test_"))

    assert not {name for name, after in pairwise(names) if name == after}
