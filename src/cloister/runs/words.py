"""The words of `cloister run` and `cloister exec`, understood in one place.

The command line sends them raw, because nothing of Python runs there while a broker answers
(`host/shim/client.c`), and the broker reads them here; without a broker the command line in
Python does, by the same functions. Hand-parsed: argparse doubles the time of a start. Nothing is
looked up or started.
"""

from __future__ import annotations

import os

from cloister.errors import UsageError

_FLAGS = {
    "-y": "yes", "--yes": "yes", "-d": "detach", "--detach": "detach", "--no-pty": "no-pty",
    "--dry-run": "dry-run", "--json": "json", "-h": "help", "--help": "help",
}  # fmt: skip
_VALUES = {"-C": "directory", "--directory": "directory", "--profile": "profile", "-e": "env", "--env": "env"}


def expand(fields: dict[str, str], argv: list[str]) -> tuple[dict[str, str], list[str]] | None:
    """Return the fields and words of a request whose words came raw; None for what Python's command line must do.

    Args:
        fields: `verb`, `cwd` (absolute) and `terminal` of the caller.
        argv: the words after the verb.

    Raises:
        UsageError: the words are wrong.
    """
    return _exec_request(fields, argv) if fields.get("verb") == "exec" else _run_request(fields, argv)


def _run_request(fields: dict[str, str], argv: list[str]) -> tuple[dict[str, str], list[str]] | None:
    options, agent, words, replaced = parse(argv)
    if "help" in options or "dry-run" in options:
        return None
    if not agent:
        raise UsageError("agent-missing", "which agent?", remedy="cloister run claude, or `cloister agents` for a list")
    request = {
        "verb": "run",
        "agent": agent,
        "replaced": "1" if replaced else "",
        "directory": os.path.normpath(os.path.join(fields.get("cwd", "/"), options.get("directory", "."))),
        "pty": fields.get("terminal", "") if not {"no-pty", "detach"} & options.keys() else "",
    }
    for name in ("profile", "env", "yes", "detach", "json"):
        request[name] = options.get(name, "")
    return request, words


def _exec_request(fields: dict[str, str], argv: list[str]) -> tuple[dict[str, str], list[str]] | None:
    directory, terminal, index = "", fields.get("terminal", ""), 0
    while index < len(argv) and argv[index].startswith("-"):
        word, index = argv[index], index + 1
        if word in ("-h", "--help"):
            return None
        if word == "--no-pty":
            terminal = ""
        elif word in ("-C", "--directory") and index < len(argv):
            directory, index = argv[index], index + 1
        else:
            raise UsageError(
                "option-unknown", f"unknown option {word}, or its value is missing", remedy="cloister exec --help"
            )
    if index >= len(argv):
        raise UsageError("run-missing", "in which run?", remedy="cloister ps")
    run, words = argv[index], argv[index + 1 :]
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise UsageError(
            "command-missing", "which command?", remedy=f"cloister exec {run} -- ls, or cloister shell {run}"
        )
    return {"verb": "exec", "run": run, "directory": directory, "pty": terminal}, words


def parse(argv: list[str], more: dict[str, str] | None = None) -> tuple[dict[str, str], str, list[str], bool]:
    """Return options, agent, the words after it, and whether they replace the agent's command.

    `more` holds further flags and their names, for verbs that take the words of `run`.

    Raises:
        UsageError: an unknown option, or an option without its value.
    """
    options: dict[str, str] = {}
    flags = _FLAGS | (more or {})
    index = 0
    while index < len(argv):
        word = argv[index]
        name, equals, value = word.partition("=")
        if word in flags:
            options[flags[word]] = "1"
        elif name in _VALUES:
            if not equals:
                index += 1
                if index >= len(argv):
                    raise UsageError("value-missing", f"{name} needs a value", remedy="cloister run --help")
                value = argv[index]
            key = _VALUES[name]
            options[key] = f"{options[key]},{value}" if key == "env" and key in options else value
        elif word == "--" or not word.startswith("-"):
            break
        else:
            raise UsageError("option-unknown", f"unknown option {word}", remedy="cloister run --help")
        index += 1
    rest = argv[index:]
    if not rest:
        return options, "", [], False
    agent, words = ("shell", rest) if rest[0] == "--" else (rest[0], rest[1:])
    replaced = bool(words) and words[0] == "--"
    if replaced and len(words) == 1:
        raise UsageError("command-missing", "there is no command after `--`", remedy="cloister run shell -- ls")
    return options, agent, words[1:] if replaced else words, replaced
