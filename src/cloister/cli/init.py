"""`cloister init`: a first policy, commented, for the agents that are installed here."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import StepError, UsageError
from cloister.policy.load import load
from cloister.policy.model import Policy, Preset
from cloister.policy.presets import all_presets
from cloister.policy.starter import how_to_store, starter


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "init",
        "Write a commented policy for the agents found on PATH.",
        prose=(
            "The file is made with mode 0600 in a directory of mode 0700. One that is there already is left alone, "
            "unless --force is given; then it is kept beside the new one."
        ),
        examples=(("cloister init", "begin"), ("cloister init --print --agents claude,pi", "only look")),
    )
    verb.add_argument(
        "--agents", metavar="NAMES", help="presets to write for, separated by commas, instead of those found"
    )
    verb.add_argument("--print", action="store_true", dest="show", help="print the policy instead of writing it")
    verb.add_argument("--force", action="store_true", help="replace a policy that is there; it is kept as a backup")
    verb.json_option("path, agents, backup")
    return verb


def main(argv: list[str]) -> int:
    """Write the policy, and say what to type next.

    Raises:
        UsageError: an unknown preset, or there is a policy already.
        StepError: the file cannot be written.
    """
    options = parser().read(argv)
    places = records.places()
    presets = _presets(places.presets)
    named = [name.strip() for name in options.agents.split(",")] if options.agents else None
    names = _known(named, presets) if named else _found(presets)
    text = starter(names, presets, variables=tuple(os.environ))
    policy = load(text, "cloister.toml", preset_names=tuple(presets))
    if options.show:
        sys.stdout.write(text)
        return 0
    target = Path(places.policy)
    if os.path.lexists(target) and not options.force:
        remedy = "edit it, or: cloister init --force (keeps a backup)"
        raise UsageError("policy-exists", "there is a policy already", where=str(target), remedy=remedy)
    try:
        backup = write_private(target, text)
    except OSError as error:
        raise StepError(
            "policy-not-written", f"cannot write the policy: {error.strerror}", where=str(target)
        ) from error
    agents = names or ["shell"]
    if options.json:
        output.print_json({"path": str(target), "agents": agents, "backup": backup})
        return 0
    print(f"wrote {output.clean(str(target))} for: {', '.join(agents)}")
    if backup:
        print(f"the old one is {output.clean(backup)}")
    for line in _keys_to_store(policy):
        print(line)
    print(f"next: cloister check, then cd into a project and cloister run {agents[0]}")
    return 0


def write_private(target: Path, text: str) -> str:
    """Put a file of mode 0600 in place of an old one, by rename; return where the old one is kept, or nothing.

    A policy that is a link (home-manager, dotfiles) is replaced at the link's own place; what it led to stays.

    Raises:
        OSError: the directory cannot be written.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.new")
    partial.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(partial, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    backup = ""
    if os.path.lexists(target):
        backup = f"{target}.{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.bak"
        if target.is_symlink():
            shutil.copyfile(target, backup)
        else:
            os.link(target, backup)
    partial.rename(target)
    return backup


def _keys_to_store(policy: Policy) -> list[str]:
    """Return how to store the keys that the policy names and that are not there yet."""
    found = []
    for name, provider in policy.providers.items():
        path = Path(provider.key.removeprefix("file:")).expanduser()
        if not path.exists() and (command := how_to_store(name, tuple(os.environ))):
            found.append(f"store the key of {name}: {command}")
    return found


def _presets(folder: str) -> Mapping[str, Preset]:
    texts: dict[str, str | bytes] = {path.stem: path.read_bytes() for path in sorted(Path(folder).glob("*.toml"))}
    return all_presets(texts)


def _found(presets: Mapping[str, Preset]) -> list[str]:
    """Return presets whose program is on PATH; `shell` is no finding, since every host has one."""
    return [
        name
        for name, preset in sorted(presets.items())
        if name != "shell" and preset.command and shutil.which(preset.command[0])
    ]


def _known(names: list[str], presets: Mapping[str, Preset]) -> list[str]:
    for name in names:
        if name not in presets:
            remedy = f"one of {', '.join(sorted(presets))}"
            raise UsageError("preset-unknown", f"there is no preset {name!r}", remedy=remedy)
    return names
