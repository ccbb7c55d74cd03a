"""What a gateway is told: documents, skills and the report of tools, as files below its declared tree. Pure.

Only what is declared is there, and the gateway cannot change it: an agent that could rewrite what it is told at
its next start would stay whoever it was once talked into being.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from cloister.errors import Problem
from cloister.plan.service_facts import ServiceFacts, SourceFile
from cloister.policy.document import show_path
from cloister.policy.service_instances import Gateway
from cloister.policy.services import Skill, Tools
from cloister.policy.values import check_inner_path, check_variable

AGENTS, CLAUDE, SOUL, TOOLS = "AGENTS.md", "CLAUDE.md", "SOUL.md", "TOOLS.md"
PLUGIN_FILE = "plugin.toml"
_BEGIN, _END = "<!-- BEGIN CLOISTER-REPORT -->", "<!-- END CLOISTER-REPORT -->"


class PluginFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`plugin.toml`: what a plugin says of itself."""

    name: str
    skills: tuple[str, ...] = ()
    """Directories with a SKILL.md, relative to it."""
    packages: tuple[str, ...] = ()
    """Directories with programs, relative to it."""
    state_dirs: tuple[str, ...] = ()
    """Directories it needs below the gateway's home."""
    required_env: tuple[str, ...] = ()
    """Variables that the service's `env` must have."""


class Plugin(NamedTuple):
    """A plugin that is used."""

    name: str
    source: str
    file: PluginFile


Tree = dict[str, SourceFile]


def documents(gateway: Gateway, facts: ServiceFacts, problems: list[Problem]) -> Tree:
    """Return the documents by name; what is missing is noted."""
    declared, tools = gateway.settings.documents, gateway.settings.tools
    found: Tree = {}
    if declared.directory:
        where = show_path((*gateway.path, "documents", "directory"))
        tree = _source(declared.directory, where, facts, problems)
        if tree is None:
            return {}
        found = {name: file for name, file in tree.items() if "/" not in name and name.endswith(".md")}
        if CLAUDE in found and AGENTS not in found:
            found[AGENTS] = found.pop(CLAUDE)
        problems += [
            Problem(f"{declared.directory} has no {name}", where, f"write {declared.directory}/{name}")
            for name in (AGENTS, SOUL, TOOLS)
            if name not in found
        ]
        at = show_path((*gateway.path, "documents", "writable"))
        problems += [Problem(f"there is no document {name}", at) for name in declared.writable if name not in found]
    if found or tools.include:
        before = found[TOOLS].text if TOOLS in found else ""
        found[TOOLS] = SourceFile(text=report(before, tools))
    return found


def report(before: str, tools: Tools) -> str:
    """Return TOOLS.md with the report of tools at its end, between its marks."""
    if _BEGIN in before and _END in before:
        before = before[: before.index(_BEGIN)] + before[before.index(_END) + len(_END) :]
    names = [f"- {name}" for name in tools.include] or ["- (none)"]
    block = [_BEGIN, "", "## Tools managed by Cloister", "", "### Built-in toolchain", "", *names, "", _END]
    return (before.rstrip() + "\n\n" if before.strip() else "") + "\n".join(block) + "\n"


def skills(gateway: Gateway, plugins: Iterable[Plugin], facts: ServiceFacts, problems: list[Problem]) -> Tree:
    """Return all files of all skills, each below its name; duplicates and missing ones are noted."""
    found: dict[str, Tree] = {}
    for index, skill in enumerate(gateway.settings.skills):
        where = show_path((*gateway.path, "skills", index))
        tree = {"SKILL.md": SourceFile(text=skill_text(skill))}
        if skill.mode == "copy":
            copied = _source(skill.source, where, facts, problems)
            if copied is None:
                continue
            tree = copied
        _add(found, skill.name, tree, where, problems)
    for plugin in plugins:
        for path in plugin.file.skills:
            below = path.strip("/") + "/"
            tree = {
                name.removeprefix(below): file
                for name, file in facts.sources[plugin.source].items()
                if name.startswith(below)
            }
            where = show_path((*gateway.path, "plugins", plugin.name))
            _add(found, below.split("/")[-2], tree, where, problems)
    return {f"{name}/{path}": file for name, tree in found.items() for path, file in tree.items()}


def _add(found: dict[str, Tree], name: str, tree: Tree, where: str, problems: list[Problem]) -> None:
    if name in found:
        problems.append(Problem(f"two skills are called {name}", where, "rename one of them"))
    elif "SKILL.md" not in tree:
        problems.append(Problem(f"the skill {name} has no SKILL.md", where))
    found[name] = tree


def skill_text(skill: Skill) -> str:
    """Return SKILL.md of an inline skill: front matter in YAML, of which JSON is a part, then its text."""
    lines = ["---", f"name: {skill.name}", f"description: {json.dumps(skill.description, ensure_ascii=False)}"]
    if skill.homepage:
        lines.append(f"homepage: {json.dumps(skill.homepage, ensure_ascii=False)}")
    if skill.metadata:
        lines.append(f"metadata: {json.dumps({'openclaw': skill.metadata}, ensure_ascii=False)}")
    return "\n".join([*lines, "---", "", skill.body.rstrip(), ""])


def plugins(gateway: Gateway, facts: ServiceFacts, problems: list[Problem]) -> tuple[Plugin, ...]:
    """Return the plugins that are used; what they miss is noted."""
    found = []
    for name, table in gateway.settings.plugins.items():
        where = show_path((*gateway.path, "plugins", name))
        if not table.enable:
            continue
        tree = _source(table.source, where, facts, problems)
        if tree is None:
            continue
        if PLUGIN_FILE not in tree:
            problems.append(Problem(f"{PLUGIN_FILE} is missing in {table.source}", where))
            continue
        try:
            file = msgspec.convert(tomllib.loads(tree[PLUGIN_FILE].text), PluginFile)
            for path in (*file.skills, *file.packages, *file.state_dirs):
                check_inner_path(path)
            for variable in file.required_env:
                check_variable(variable)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
            problems.append(Problem(f"{table.source}/{PLUGIN_FILE}: {error}", where))
            continue
        _check_plugin(name, file, table.env, where, problems)
        if table.settings and not file.state_dirs:
            problems.append(Problem(f"the plugin {name} has settings, and no state_dirs to put them in", where))
        found.append(Plugin(name, table.source, file))
    return tuple(found)


def _check_plugin(name: str, file: PluginFile, env: Mapping[str, str], where: str, problems: list[Problem]) -> None:
    if file.name != name:
        problems.append(Problem(f"its name is {file.name[:60]!r}, and the policy calls it {name!r}", where))
    for variable in file.required_env:
        if variable not in env:
            remedy = f'env.{variable} = "file:/etc/cloister/keys/NAME"'
            problems.append(Problem(f"the plugin {name} needs the variable {variable}", where, remedy))


def _source(path: str, where: str, facts: ServiceFacts, problems: list[Problem]) -> Tree | None:
    if path not in facts.sources:
        problems.append(Problem(facts.unreadable.get(path, f"{path} cannot be read"), where))
        return None
    return facts.sources[path]
