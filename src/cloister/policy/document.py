"""One policy text as raw tables that remember on which line each key stands.

It reads TOML (written by hand) and JSON (made by Nix), and knows nothing of what the keys
mean: that is for `load`. It is not a TOML parser either: `tomllib` decides what is valid,
and `scanner` looks up, in text that is known to be valid, where keys are.
TOML: https://toml.io/en/v1.0.0. JSON: RFC 8259, with duplicate keys and NaN refused.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cloister.errors import PolicyError, Problem
from cloister.policy.scanner import BARE_KEY, Path, key_lines

MAX_BYTES = 1024 * 1024
"""A policy for a thousand agents is about 300 KiB; more than this is not a policy."""
MAX_MISTAKES = 100
"""More are not read by anybody, and looking for what was meant takes time."""
MAX_DEPTH = 32
"""Tables in tables; the model itself is six deep."""

Tables = dict[str, Any]

_PART = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{128}}")
"""tomllib takes more than the square of the parts of a dotted key: 40 KB of `a.a.a` keep it busy for 6 s.
This is looked for in values too, where 127 labels are the most a host name can have (RFC 1035)."""
_AT_LINE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True, slots=True)
class Document:
    """A policy text after reading and before it is given a meaning."""

    name: str
    """The file name shown to people."""
    tables: Tables
    lines: Mapping[Path, int] = field(default_factory=dict)
    """The line, counted from 1, of every key and array item that was found."""

    def where(self, path: Path) -> str:
        """Return `file:12 .agents.claude.egress`, with the line of the nearest parent that has one."""
        shown = show_path(path)
        for end in range(len(path), 0, -1):
            line = self.lines.get(path[:end])
            if line is not None:
                return f"{self.name}:{line} {shown}"
        return f"{self.name} {shown}" if shown else self.name


class Mistakes:
    """Collects the mistakes of one document, so that all of them are shown at once."""

    def __init__(self, document: Document) -> None:
        """Start with none."""
        self.document = document
        self.problems: list[Problem] = []
        self.paths: set[Path] = set()
        """Where a mistake was noted."""
        self._broken: frozenset[Path] = frozenset()

    def add(self, path: Path, message: str, remedy: str = "") -> None:
        """Note a mistake once; raise as `settle` does when there are `MAX_MISTAKES` of them."""
        if any(path[: len(broken)] == broken or broken[:-1] == path for broken in self._broken):
            return
        problem = Problem(message, self.document.where(path), remedy)
        if problem not in self.problems:
            self.problems.append(problem)
            self.paths.add(path)
        if len(self.problems) >= MAX_MISTAKES:
            self.problems.append(Problem(f"and more: only the first {MAX_MISTAKES} mistakes are shown"))
            self.settle()

    def close_broken(self) -> None:
        """From now on note nothing at or below the places found so far, nor on a table around one of them.

        A key that is misspelt is also missing: one mistake is reported once.
        """
        self._broken = frozenset(self.paths)

    def settle(self, reference: str = "policy-invalid") -> None:
        """Raise `PolicyError` with everything noted, in the order of the lines; do nothing if there is nothing."""
        if self.problems:
            raise PolicyError(sorted(self.problems, key=_line_of), reference=reference)


def _line_of(problem: Problem) -> int:
    """Order by line; what has none stands first, and the note that closes a long list stands last."""
    found = re.search(r":(\d+) \.", problem.where)
    return int(found[1]) if found else 0 if problem.where else MAX_BYTES


def show_path(path: Path) -> str:
    """Return `.agents.claude.egress.allow[2].port`; keys that are not bare are quoted and cut at 60 characters."""
    shown = ""
    for key in path:
        if isinstance(key, int):
            shown += f"[{key}]"
        elif BARE_KEY.fullmatch(key):
            shown += f".{key[:60]}"
        else:
            shown += "." + json.dumps(key[:60])
    return shown


def read(text: str | bytes, name: str) -> Document:
    """Return the raw tables of a policy text; JSON when `name` ends in `.json` or the text begins with `{`.

    Raises:
        PolicyError: `policy-unreadable`; the text is too long, not UTF-8, holds NUL or a byte
            order mark, or is not valid TOML or JSON. One problem, with its line.
    """
    text = _plain_text(text, name)
    is_json = name.endswith(".json") or text.lstrip()[:1] == "{"
    tables = _parse(text, name, is_json=is_json)
    if not isinstance(tables, dict):
        _refuse("a policy is a table of keys, not a single value", name, 'begin with {"schema": 1}')
    if _deeper_than(tables, MAX_DEPTH):
        _refuse(f"nested deeper than {MAX_DEPTH} levels", name)
    lines: dict[Path, int] = {}
    for path, line in key_lines(text, is_json=is_json):
        for end in range(1, len(path) + 1):  # `[agents.pi]` also tells where `agents` is
            lines.setdefault(path[:end], line)
    return Document(name, tables, lines)


def _parse(text: str, name: str, *, is_json: bool) -> Any:
    """Return what the text holds, with every way in which the parsers fail turned into a refusal."""
    if not is_json and _LONG_KEY.search(text):
        _refuse(f"nested deeper than {MAX_DEPTH} levels", name)
    try:
        return _read_json(text) if is_json else tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        _refuse_toml(str(error), name, text)
    except json.JSONDecodeError as error:
        _refuse(f"not valid JSON: {error.msg.lower()}", f"{name}:{error.lineno}")
    except _DuplicateKeyError as error:
        _refuse(f"the key {show_path((error.key,))} is given twice in one object", name)
    except RecursionError:
        _refuse(f"nested deeper than {MAX_DEPTH} levels", name)
    except ValueError as error:
        # Numbers of more than 4300 digits, and constants that JSON does not have.
        _refuse(f"not a value a policy can hold: {str(error).lower()[:80]}", name)


def _refuse(message: str, where: str, remedy: str = "") -> NoReturn:
    raise PolicyError([Problem(message, where, remedy)], reference="policy-unreadable")


def _plain_text(given: str | bytes, name: str) -> str:
    """Return the text, or refuse what an editor would show as something else than what is read."""
    if len(given) > MAX_BYTES:
        _refuse(f"larger than {MAX_BYTES} bytes", name, "split it: one file holds one policy")
    if isinstance(given, str):
        text = given
        if not _is_unicode(text):
            _refuse("not UTF-8 text", name, f"iconv -t UTF-8 {name}")
    else:
        try:
            text = given.decode("utf-8")
        except UnicodeDecodeError as error:
            line = given.count(b"\n", 0, error.start) + 1
            _refuse("not UTF-8 text", f"{name}:{line}", f"iconv -t UTF-8 {name}")
    if text.startswith("\ufeff"):
        _refuse("begins with a byte order mark", f"{name}:1", f"sed -i '1s/^\\xEF\\xBB\\xBF//' {name}")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        _refuse("holds a NUL character", f"{name}:{line}", "delete the character")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _read_json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> Tables:
        table: Tables = {}
        for key, value in items:
            if key in table:
                raise _DuplicateKeyError(key)
            table[key] = value
        return table

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)


def _refuse_toml(message: str, name: str, text: str) -> NoReturn:
    """Say what tomllib said, in the words of a policy: it reports one mistake, with its line."""
    found = _AT_LINE.search(message)
    what = _AT_LINE.sub("", message)
    line = found[1] if found and found[1] else str(text.count("\n") + 1)
    twice = what.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate", "Duplicate inline"))
    shown = "a key or table is given twice" if twice else f"not valid TOML: {what[:1].lower()}{what[1:]}"
    _refuse(shown, f"{name}:{line}", "keep one of the two" if twice else "")


def _deeper_than(value: Any, limit: int) -> bool:
    """Walk level by level: a recursive walk could itself be brought down by depth."""
    level = [value]
    for _ in range(limit):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return False
        level = deeper
    return any(isinstance(item, dict | list) for item in level)
