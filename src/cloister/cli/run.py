"""`cloister run`: start an agent in its sandbox.

Hand-parsed and import-free on purpose: this is the path that is measured against plain
bubblewrap. Everything that needs thought happens in the broker.
"""

from __future__ import annotations

import os
import sys

from cloister.errors import UsageError
from cloister.runs import client

USAGE = """\
usage: cloister run [OPTIONS] AGENT [ARGUMENT...]
       cloister run [OPTIONS] AGENT -- COMMAND [ARGUMENT...]

Start AGENT in its sandbox. ARGUMENTs are appended to the agent's own command;
after `--`, COMMAND is run instead of it, in the same sandbox.

options:
  -C, --directory DIR   start in DIR instead of the current directory
      --profile NAME    lay [profiles.NAME] of the policy over the agent
  -e, --env NAME        carry the variable NAME in from the environment (repeatable)
  -y, --yes             do not ask about the environment that is carried in
  -d, --detach          leave it running and print its id; output goes to `cloister logs`
      --no-pty          use pipes even on a terminal
      --dry-run         print the plan and start nothing (`cloister plan`)
      --json            with --dry-run or --detach: print JSON
  -h, --help            show this text

exit codes: the command's own; 124 timed out, 125 cloister failed, 126 cannot be
executed, 127 not found, 128+n ended by signal n.
"""
_FLAGS = {
    "-y": "yes", "--yes": "yes", "-d": "detach", "--detach": "detach", "--no-pty": "no-pty",
    "--dry-run": "dry-run", "--json": "json", "-h": "help", "--help": "help",
}  # fmt: skip
_VALUES = {"-C": "directory", "--directory": "directory", "--profile": "profile", "-e": "env", "--env": "env"}


def main(argv: list[str], verb: str = "run") -> int:
    """Parse, ask the broker, become the shim."""
    options, agent, words, replaced = parse(argv)
    if "help" in options:
        sys.stdout.write(USAGE)
        return 0
    if not agent:
        raise UsageError("agent-missing", "which agent?", remedy="cloister run claude, or `cloister agents` for a list")
    if "dry-run" in options:
        from cloister.cli import plan

        return plan.show(options, agent, words, replaced=replaced)
    directory = _open_directory(options.get("directory", "."))
    terminal = os.isatty(0) and os.isatty(1) and not {"no-pty", "detach"} & options.keys()
    fields = {
        "verb": verb,
        "agent": agent,
        "replaced": "1" if replaced else "",
        "directory": os.path.abspath(options.get("directory", ".")),
        "pty": "1" if terminal else "",
        "profile": options.get("profile", ""),
        "env": options.get("env", ""),
        "yes": options.get("yes", ""),
        "detach": options.get("detach", ""),
        "json": options.get("json", ""),
    }
    connection = client.request(fields, words, (0, 1, 2, directory))
    client.become_shim(connection)
    return 125


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


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            "directory-unusable", f"cannot start there: {reason}", where=path, remedy="cd to a project"
        ) from None
