"""Sizes: modules of at most 500 lines, functions of at most 50, `__init__.py` of at most 30; the same for C."""

import ast
import re
import tomllib
from pathlib import Path

MODULE_LINES = 500
FUNCTION_LINES = 50
INIT_LINES = 30


def _exempt(root: Path) -> dict[str, str]:
    """Return `path` or `path:function` with the reason why it may be longer."""
    entries = tomllib.loads((root / "tests/style/exempt_sizes.toml").read_text(encoding="utf-8")).get("exempt", [])
    return {entry["what"]: entry["reason"] for entry in entries}


def _python_functions(text: str) -> list[tuple[str, int]]:
    """Return name and length of each function, from `def` to its last line."""
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _c_functions(text: str) -> list[tuple[str, int]]:
    """Return name and length of each function, from its name at column 0 to the closing brace at column 0."""
    found = []
    name, start, opened = "", 0, False
    for number, line in enumerate(text.splitlines(), start=1):
        if not opened and (match := re.match(r"(?=[A-Za-z_])[^(=;]*?(\w+)\s*\(", line)):
            name, start = match[1], number
        if name and not opened and line.rstrip().endswith(";"):
            name = ""  # a prototype
        if name and line.rstrip().endswith("{"):
            opened = True
        if opened and line.startswith("}"):
            found.append((name, number - start + 1))
            name, opened = "", False
    return found


def _measures(root: Path, path: Path) -> list[tuple[str, int, int]]:
    """Return what is measured in a file: its name, or name:function; its length; and its limit."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(root))
    functions = _python_functions(text) if path.suffix == ".py" else _c_functions(text)
    whole = (name, text.count("\n"), INIT_LINES if path.name == "__init__.py" else MODULE_LINES)
    return [whole, *((f"{name}:{function}", length, FUNCTION_LINES) for function, length in functions)]


def test_sizes_stay_readable(root: Path, tracked: list[Path]) -> None:
    """No module or function grows beyond its limit without a written reason."""
    exempt = _exempt(root)
    sources = [path for path in tracked if path.suffix in {".py", ".c", ".h"}]
    too_long = [
        (what, length)
        for path in sources
        for what, length, limit in _measures(root, path)
        if length > limit and what not in exempt
    ]

    assert not too_long


def test_every_exemption_is_needed_and_has_a_reason(root: Path) -> None:
    """The list of exemptions names only things that exist, each with a reason."""
    for what, reason in _exempt(root).items():
        path, _, function = what.partition(":")
        text = (root / path).read_text(encoding="utf-8")
        assert reason, what
        assert re.search(rf"\b{function}\b", text), what


def test_long_functions_are_found() -> None:
    """The measure itself sees a long function, in Python and in C, and does not mistake a struct for one."""
    python = "def f():\n" + "    x = 1\n" * 60
    c = (
        "struct s {\n    int x;\n};\nint f(int);\nint a[] = {\n1\n};\nstatic int\ng(int a)\n{\n"
        + "    a++;\n" * 60
        + "}\n"
    )

    assert _python_functions(python) == [("f", 61)]
    assert _c_functions(c) == [("g", 63)]
