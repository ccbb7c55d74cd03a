"""What `cloister check` says of credentials that are valid and yet will not do what was meant. Reads no secret."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from cloister.credentials.bindings import Binding, bind
from cloister.egress.addresses import Guard
from cloister.egress.decision import Target, decide
from cloister.egress.hosts import parse_host
from cloister.egress.rules import Ruleset
from cloister.policy.model import Agent
from cloister.policy.scanner import Path
from cloister.runs.credentials_places import host_path


class Warned(NamedTuple):
    """One warning: the key it is about, what, and what to do."""

    at: Path
    message: str
    remedy: str


def warnings(agent: Agent, name: str, home: str, rules: tuple[Ruleset, Guard]) -> Iterator[Warned]:
    """Yield what `check` says of an agent's credentials: the key it is about, what, and what to do."""
    bindings: list[Binding] = []
    shown = (*agent.filesystem.read, *agent.filesystem.write, *agent.workspace.roots)
    for key, credential in agent.credentials.items():
        at: Path = ("credentials", key)
        if not credential.secret:
            continue
        scheme, _, target = credential.secret.partition(":")
        if scheme == "env" and target in agent.pass_environment:
            why = f"the agent {name!r} is given the secret itself: {target} is carried in by pass_environment"
            yield Warned(at, why, f"remove {target} from pass_environment")
        if scheme == "file" and _within(host_path(credential.secret, home), shown, home):
            why = f"the secret of {key!r} lies where the agent {name!r} may look, so it will not start"
            yield Warned(at, why, "move the file, such as to ~/.config/cloister")
        bound = bind(key, credential, lambda _method, _path: True)
        if bound is None:
            yield Warned(at, f"the secret of {key!r} goes nowhere", 'add inject = { host = "api.example.org", ... }')
            continue
        bindings.append(bound)
        yield from _unreachable(at, bound, name, rules)
    for one, other in combinations((bound for bound in bindings if bound.always), 2):
        if one.place == other.place and one.port == other.port and one.hosts & other.hosts:
            why = f"{one.name!r} and {other.name!r} are both put into the same part of requests to the same host"
            yield Warned(("credentials", other.name), why, "limit them by methods or paths, or give them env")


def _unreachable(at: Path, bound: Binding, name: str, rules: tuple[Ruleset, Guard]) -> Iterator[Warned]:
    for host in sorted(bound.hosts):
        verdict = decide(*rules, Target("connect", parse_host(host), bound.port, inspected=True))
        if verdict.action == "deny":
            why = f"{bound.name!r} is bound to {host}:{bound.port}, which the agent {name!r} may not reach"
            yield Warned(at, why, verdict.remedy or "allow the host, or remove the credential")


def _within(path: str, places: tuple[str, ...], home: str) -> bool:
    expanded = [home + place[1:] if place.startswith("~") else place for place in places]
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in expanded)
