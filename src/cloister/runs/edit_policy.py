"""Adding allow entries to the text of a hand-written policy: comments, order and layout stay.

Finding the place is a matter of text and may fail; whether the result is right is not. The new
text counts only when it reads as the old tables with exactly these entries added.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from typing import Any

from cloister.errors import UnsupportedError

_HEADER = re.compile(r"^[ \t]*\[.*$", re.MULTILINE)
_ALLOW = re.compile(r"^[ \t]*allow[ \t]*=[ \t]*\[", re.MULTILINE)
_TOKEN = re.compile(
    r'"""[\s\S]*?"""|'
    r"'''[\s\S]*?'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'|#[^\n]*|[\[\]{}]|\s+|[^\s\[\]{}\"'#]+"
)


def add_allow(text: str, agent: str, entries: list[str], *, name: str) -> str:
    """Return the policy text with entries added to an agent's `egress.allow`.

    Args:
        text: the policy, valid TOML.
        agent: a key of `[agents]` in it.
        entries: hosts as `egress.allow` has them, without quotes.
        name: the file, for messages.

    Raises:
        UnsupportedError: the text is laid out in a way that is not edited by a program.
    """
    try:
        before = tomllib.loads(text)
        wanted = _expected(before, agent, entries)
        changed = _edit(text, agent, [json.dumps(entry) for entry in entries])
        if tomllib.loads(changed) == wanted:
            return changed
    except (tomllib.TOMLDecodeError, KeyError, ValueError):
        pass
    raise UnsupportedError(
        "policy-not-editable",
        f"the egress table of {agent!r} is not laid out in a way that can be edited safely",
        where=name,
        remedy="add the entries by hand",
    )


def _expected(tables: dict[str, Any], agent: str, entries: list[str]) -> dict[str, Any]:
    wanted = copy.deepcopy(tables)
    egress = wanted["agents"][agent].setdefault("egress", {})
    egress["allow"] = [*egress.get("allow", []), *entries]
    return wanted


def _edit(text: str, agent: str, quoted: list[str]) -> str:
    key = rf"(?:{re.escape(agent)}|\"{re.escape(agent)}\"|'{re.escape(agent)}')"
    header = re.compile(rf"^[ \t]*\[[ \t]*agents[ \t]*\.[ \t]*{key}[ \t]*\.[ \t]*egress[ \t]*\][^\n]*$", re.MULTILINE)
    found = header.search(text)
    if found is None:
        gap = "" if text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}[agents.{agent}.egress]\nallow = [{', '.join(quoted)}]\n"
    following = _HEADER.search(text, found.end())
    allow = _ALLOW.search(text, found.end(), following.start() if following else len(text))
    if allow is None:
        return f"{text[: found.end()]}\nallow = [{', '.join(quoted)}]{text[found.end() :]}"
    return _extend(text, allow.end(), quoted)


def _extend(text: str, start: int, quoted: list[str]) -> str:
    """Add items to the array whose opening bracket ends at `start`; the style of the array is kept."""
    depth, last, at = 1, start, start
    while depth:
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError("the array does not end")
        word, at = token[0], token.end()
        depth += (word in "[{") - (word in "]}") if len(word) == 1 else 0
        if depth and not word.isspace() and not word.startswith("#"):
            last = at
    close = at - 1
    empty = last == start
    comma = "" if empty or text[last - 1] == "," else ","
    if "\n" not in text[start:close]:
        separator = "" if empty else " "
        return f"{text[:last]}{comma}{separator}{', '.join(quoted)}{text[close:]}"
    line = text.rfind("\n", 0, close) + 1
    indent = " " * (len(text[line:close]) - len(text[line:close].lstrip()) + 4)
    items = "".join(f"{indent}{item},\n" for item in quoted)
    if text[line:close].strip():  # the last item stands on the line of the closing bracket
        return f"{text[:last]}{comma}\n{items}{text[close:]}"
    return f"{text[:last]}{comma}{text[last:line]}{items}{text[line:]}"
