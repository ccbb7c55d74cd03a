"""From a policy to one agent as it will run: preset, then agent, then profile.

Raw tables are merged before they become values, since only they know which keys were
written: tables are merged key by key, everything else is replaced. What a preset knows
(hosts, carried files, variables, protected paths) is added to the agent's own lists, never
replaced by them. Narrowing by a project or by the system is for `tighten`, after this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cloister.errors import PolicyError, Problem
from cloister.policy.document import Document, Tables
from cloister.policy.load import load_document
from cloister.policy.model import Agent, Policy, Preset
from cloister.policy.scanner import Path


@dataclass(frozen=True, slots=True)
class ResolvedAgent:
    """One agent with everything that its preset and profile say folded in."""

    name: str
    profile: str
    agent: Agent
    """The whole truth about what it may do: the preset's hosts, files and variables stand in here too."""
    preset: Preset
    """What has no place in an agent: state directories, secrets, seeds, endpoint variables, the note."""
    policy: Policy
    """The file it came from, for providers, audit and images."""
    sources: Mapping[Path, str]
    """Where a key, or an item of a list, was written: `cloister.toml:12 .agents.claude.egress.allow[1]`
    or `preset claude`. Keys that nobody wrote are absent: they have the model's default."""

    def source(self, path: Path) -> str:
        """Return where a key was written, or else the nearest table around it; empty for a default."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.sources:
                return self.sources[path[:end]]
        return ""


def merge(base: Tables, over: Mapping[str, Any]) -> Tables:
    """Return `base` with `over` laid on it: tables are merged, everything else is replaced. Neither is changed."""
    merged = copy.copy(base)
    for key, value in over.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def resolve(
    document: Document,
    agent_name: str,
    profile: str = "",
    *,
    presets: Mapping[str, Preset],
    policy: Policy | None = None,
) -> ResolvedAgent:
    """Return one agent of a policy, ready for the compiler.

    Args:
        document: the policy as `document.read` returned it.
        agent_name: a key of `[agents]`.
        profile: a key of `[profiles]`, or empty.
        presets: every preset there is, by name (`presets.builtin_presets` and the user's own).
        policy: what `load.load_document` returned for this document, so that a broker checks it only once.

    Raises:
        PolicyError: `policy-invalid` for mistakes in the file; `agent-unknown`, `profile-unknown`.
    """
    if policy is None:
        policy = load_document(document, preset_names=tuple(presets))
    _require(agent_name, policy.agents, "agent")
    own = document.tables["agents"][agent_name]
    sources = _written(document, own, ("agents", agent_name))
    if profile:
        _require(profile, policy.profiles, "profile")
        over = document.tables["profiles"][profile]
        own = merge(own, over)
        written = _written(document, over, ("profiles", profile))
        replaced = {path for path in written if not isinstance(_at(over, path), dict)}
        sources = {path: where for path, where in sources.items() if not _below_any(path, replaced)} | written
    preset = presets.get(own.get("preset", ""), Preset(schema=1))
    tables, added = _with_preset(own, preset)
    return ResolvedAgent(
        name=agent_name,
        profile=profile,
        agent=msgspec.convert(tables, Agent),
        preset=_rest_of(preset, own),
        policy=policy,
        sources=_shifted(sources, added, own.get("preset", "")),
    )


def _require(name: str, table: Mapping[str, object], what: str) -> None:
    if name not in table:
        known = ", ".join(sorted(table)[:12])
        remedy = f"one of {known}" if known else f"write the table [{what}s.{name}], or type: cloister init"
        shown = name[:60]
        raise PolicyError([Problem(f"the policy has no {what} {shown!r}", "", remedy)], reference=f"{what}-unknown")


_ADDED: tuple[tuple[Path, str], ...] = (
    (("egress", "allow"), "hosts"),
    (("carry",), "carry"),
    (("pass_environment",), "pass_environment"),
    (("workspace", "protect"), "protect"),
)
"""Lists of an agent that a preset adds to, and the preset's key for each."""


def _with_preset(own: Tables, preset: Preset) -> tuple[Tables, dict[Path, int]]:
    """Return the agent's tables on top of the preset's, and how many items the preset put before each list."""
    base: Tables = {
        "command": list(preset.command),
        "environment": dict(preset.environment),
        "hardening": {"write_execute": preset.write_execute, "netlink": preset.netlink},
    }
    tables = merge(base, own)
    added: dict[Path, int] = {}
    for path, key in _ADDED:
        mine = _at(own, path) or []
        without = _without(own, key)
        before = [item for item in getattr(preset, key) if without is not None and item not in (*mine, *without)]
        added[path] = len(before)
        tables = merge(tables, _nest(path, [*before, *mine]))
    return tables, added


def _without(own: Tables, key: str) -> list[str] | None:
    """Return what the agent does not want of a preset's list; None means nothing of it."""
    if key == "hosts" and not own.get("egress", {}).get("preset_hosts", True):
        return None
    return _at(own, ("workspace", "unprotected")) or [] if key == "protect" else []


def _rest_of(preset: Preset, own: Tables) -> Preset:
    """Return the preset without what has been folded in, so that nothing is added twice.

    A secret file that the agent's own `carry` names exactly is carried in: the owner said so.
    """
    named = {path.removeprefix("~/").rstrip("/") for path in own.get("carry", [])}
    return msgspec.structs.replace(
        preset,
        command=(),
        carry=(),
        environment={},
        pass_environment=(),
        hosts=(),
        protect=(),
        secrets=tuple(path for path in preset.secrets if path not in named),
    )


def _written(document: Document, tables: Mapping[str, Any], at: Path) -> dict[Path, str]:
    """Return where every key and list item below `at` is written, by its path within the agent."""
    found: dict[Path, str] = {}
    stack: list[tuple[Path, Any]] = [((), tables)]
    while stack:
        path, value = stack.pop()
        if path:
            found[path] = document.where(at + path)
        if isinstance(value, Mapping):
            stack.extend(((*path, key), item) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend(((*path, index), item) for index, item in enumerate(value))
    return found


def _shifted(sources: dict[Path, str], added: dict[Path, int], preset: str) -> dict[Path, str]:
    """Move the items of lists that a preset stands in front of, and name the preset for its own."""
    shifted: dict[Path, str] = {}
    for path, where in sources.items():
        moved = path
        for parent, count in added.items():
            size = len(parent)
            if path[:size] == parent and len(path) > size:
                moved = (*parent, int(path[size]) + count, *path[size + 1 :])
        shifted[moved] = where
    for parent, count in added.items():
        shifted.update({(*parent, index): f"preset {preset}" for index in range(count)})
    return shifted


def _at(tables: Mapping[str, Any], path: Path) -> Any:
    value: Any = tables
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(str(key))
        elif isinstance(value, list) and isinstance(key, int):
            value = value[key]
        else:
            return None
    return value


def _nest(path: Path, value: Any) -> Tables:
    for key in reversed(path):
        value = {str(key): value}
    nested: Tables = value
    return nested


def _below_any(path: Path, tops: set[Path]) -> bool:
    return any(path[:end] in tops for end in range(1, len(path) + 1))
