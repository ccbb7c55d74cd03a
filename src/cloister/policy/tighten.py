"""Narrowing an agent by a file that is trusted less.

That is `.cloister.toml` in a workspace, or a user's file below a system policy that has an
agent of the same name. Such a file may make lists shorter, limits lower and modes stricter; every attempt to widen
is refused with its key, never ignored, since whoever wrote it believes it holds. There is
one rule per key of the model; a key without a rule cannot be written in such a file at all.
Paths are only ever taken out, never replaced by one below: what looks like a narrower path
may be a symlink that an agent made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from cloister.policy.document import Document, Mistakes
from cloister.policy.hosts import network_covers, parse_network, parse_rule
from cloister.policy.model import (
    Agent,
    AgentSandbox,
    Egress,
    EgressRule,
    Filesystem,
    Hardening,
    Identity,
    Limits,
    Llm,
    MicroVm,
    Unit,
    Workspace,
)
from cloister.policy.scanner import Path
from cloister.policy.units import parse_cpu, parse_duration, parse_size

T = TypeVar("T", bound=msgspec.Struct)
Rule = Callable[[Any, Any], Any]
"""Takes the value that holds and the value wanted; returns what holds from now on, or raises ValueError."""


def tighten(agent: Agent, document: Document, at: Path) -> Agent:
    """Return the agent narrowed by one table of a document.

    Args:
        agent: what holds so far, with preset and profile folded in (`merge.resolve`).
        document: the file that narrows; `load.load_project` or `load.load` has accepted it.
        at: the table in it, such as `("agents", "claude")`; an absent table changes nothing.

    Raises:
        PolicyError: `policy-widens`, with every key that asks for more than the agent has.
    """
    tables: Any = document.tables
    for key in at:
        tables = tables.get(key, {}) if isinstance(tables, Mapping) else {}
    mistakes = Mistakes(document)
    result = _narrow(agent, msgspec.convert(tables, Agent), tables, at, mistakes)
    mistakes.settle(reference="policy-widens")
    return result


def tighten_project(agent: Agent, name: str, project: Document) -> Agent:
    """Return the agent narrowed by a project file: first by `[every_agent]`, then by its own table."""
    return tighten(tighten(agent, project, ("every_agent",)), project, ("agents", name))


def _narrow(base: T, wanted: T, tables: Mapping[str, Any], at: Path, mistakes: Mistakes) -> T:
    """Apply the rule of every key that was written; what was not written stays as it is."""
    changes: dict[str, Any] = {}
    for key, written in tables.items():
        have, want = getattr(base, key), getattr(wanted, key)
        if isinstance(have, msgspec.Struct):
            changes[key] = _narrow(have, want, written, (*at, key), mistakes)
            continue
        try:
            changes[key] = RULES.get(type(base), {}).get(key, _fixed)(have, want)
        except ValueError as error:
            mistakes.add((*at, key), str(error), "take the key out here, or allow it in your own policy")
    return msgspec.structs.replace(base, **changes)


def _fixed(have: Any, want: Any) -> Any:
    """Accept only what holds already."""
    if want != have:
        raise ValueError("this key can only be set in your own policy")
    return have


def _folded(_have: Any, _want: Any) -> Any:
    raise ValueError("the preset's hosts are part of egress.allow by now: list there what shall stay")


def _only(value: bool) -> Rule:
    """Accept the stricter of two answers."""

    def rule(have: bool, want: bool) -> bool:
        if want not in {have, value}:
            raise ValueError(f"this can only be made {str(value).lower()}")
        return want

    return rule


def _stricter(*order: str) -> Rule:
    """Accept a step towards the end of `order`, which runs from weak to strict."""

    def rule(have: str, want: str) -> str:
        if order.index(want) < order.index(have):
            raise ValueError(f"{want} is weaker than {have}, which holds")
        return want

    return rule


def _fewer(have: tuple[str, ...], want: tuple[str, ...]) -> tuple[str, ...]:
    """Accept a list in which nothing is new."""
    if new := [item for item in want if item not in have]:
        raise ValueError(f"this list can only get shorter: {_listed(new)} is not in it so far")
    return want


def _fewer_roots(have: tuple[str, ...], want: tuple[str, ...]) -> tuple[str, ...]:
    """Like `_fewer`, but empty is not the least here: it stands for the project directory."""
    if bool(have) != bool(want):
        raise ValueError("an empty list of roots means the project directory: this can only be set in your own policy")
    return _fewer(have, want)


def _more(have: tuple[Any, ...], want: tuple[Any, ...]) -> tuple[Any, ...]:
    """Add to a list of things that are refused."""
    return have + tuple(item for item in want if item not in have)


def _lower(parse: Callable[[str], int]) -> Rule:
    """Accept a limit that is not above the one that holds; empty is no limit."""

    def rule(have: str, want: str) -> str:
        if have and (not want or parse(want) > parse(have)):
            raise ValueError(f"this limit can only get lower than {have}")
        return want

    return rule


def _lower_number(have: float | None, want: float | None) -> float | None:
    """Accept a number that is not above the one that holds; None is no limit."""
    if have is not None and (want is None or want > have):
        raise ValueError(f"this limit can only get lower than {have}")
    return want


def _narrower_rules(
    have: tuple[str | EgressRule, ...], want: tuple[str | EgressRule, ...]
) -> tuple[str | EgressRule, ...]:
    """Accept rules that are each covered by one rule that holds."""
    wide = [parse_rule(entry) for entry in have]
    new = [rule.text() for rule in map(parse_rule, want) if not any(other.covers(rule) for other in wide)]
    if new:
        raise ValueError(f"the agent may not reach {_listed(new)}, or not with these methods and paths")
    return want


def _narrower_networks(have: tuple[str, ...], want: tuple[str, ...]) -> tuple[str, ...]:
    """Accept networks that lie each within one that holds."""
    wide = [str(parse_network(text)) for text in have]
    new = [text for text in want if not any(network_covers(other, str(parse_network(text))) for other in wide)]
    if new:
        raise ValueError(f"the agent may not reach {_listed(new)}")
    return want


def _narrower_models(have: tuple[str, ...], want: tuple[str, ...]) -> tuple[str, ...]:
    """Accept model patterns that are each covered by one that holds; an empty list is every model."""
    if have and not want:
        raise ValueError("an empty list means every model")
    new = [model for model in want if have and not any(_covers_model(pattern, model) for pattern in have)]
    if new:
        raise ValueError(f"the agent may not use {_listed(new)}")
    return want


def _covers_model(wide: str, narrow: str) -> bool:
    """Judge names and `prefix*`; any other pattern only covers itself."""
    prefix = wide[:-1] if wide.endswith("*") else None
    plain = prefix is not None and not any(sign in prefix for sign in "*?[")
    return wide == narrow or (plain and prefix is not None and narrow.startswith(prefix))


def _listed(items: list[str]) -> str:
    return ", ".join(item[:80] for item in items[:5]) + (", …" if len(items) > 5 else "")  # noqa: PLR2004  one line


RULES: Mapping[type[msgspec.Struct], Mapping[str, Rule]] = {
    Agent: {
        "preset": _fixed,
        "isolation": _stricter("namespace", "unit", "microvm"),
        "command": _fixed,
        "environment": _fixed,
        "environment_files": _fewer,
        "settings": _fixed,
        "pass_environment": _fewer,
        "carry": _fewer,
        "sandbox_note": _only(value=True),
        "git_identity": _only(value=False),
        "environment_audit": _only(value=True),
        "credentials": _fixed,
    },
    Workspace: {
        "roots": _fewer_roots,
        "mode": _stricter("direct", "overlay"),
        "protect": _more,
        "unprotected": _fewer,
    },
    Filesystem: {"read": _fewer, "write": _fewer, "hide": _more},
    Egress: {
        "mode": _stricter("internet", "learn", "ask", "deny"),
        "allow": _narrower_rules,
        "preset_hosts": _folded,
        "deny": _more,
        "private": _narrower_networks,
        "upstream_proxy": _fixed,
    },
    Identity: {"audiences": _fewer, "lifetime": _lower(parse_duration)},
    Llm: {
        "providers": _fewer,
        "models": _narrower_models,
        "aliases": _fixed,
        **dict.fromkeys(
            (
                "requests_per_minute",
                "concurrency",
                "max_tokens",
                "tokens_per_minute",
                "tokens_per_run",
                "tokens_per_day",
                "tokens_per_month",
                "cost_per_minute_usd",
                "cost_per_run_usd",
                "cost_per_day_usd",
                "cost_per_month_usd",
            ),
            _lower_number,
        ),
        "alerts": _fixed,
        "on_exhausted": _stricter("ask", "refuse"),
        "fallback": _only(value=False),
        "redact": _more,
        "redact_secrets": _only(value=True),
        "record": _only(value=False),
    },
    Limits: {
        "memory_max": _lower(parse_size),
        "tasks_max": _lower_number,
        "cpu_quota": _lower(parse_cpu),
        "disk_max": _lower(parse_size),
        "runtime_max": _lower(parse_duration),
        "open_files": _lower_number,
        "enforce": _stricter("available", "cgroup"),
    },
    Hardening: {
        "nested": _only(value=False),
        "landlock": _stricter("off", "available", "required"),
        "write_execute": _only(value=False),
        "netlink": _only(value=False),
        "ptrace": _only(value=False),
    },
    AgentSandbox: {"managed": _fixed, "deny_read": _more},
    Unit: dict.fromkeys(Unit.__struct_fields__, _fixed),
    MicroVm: {
        "warm": _only(value=False),
        "image": _fixed,
        "memory": _lower(parse_size),
        "disk_rate": _lower(parse_size),
        "cpus": _lower_number,
        "disk": _lower(parse_size),
        "ports": _fewer,
        "monitor": _fixed,
        "network": _stricter("bridge", "none"),
    },
}
"""What each key of an agent may become. `tests/unit/policy/test_tighten.py` fails when one is missing."""
