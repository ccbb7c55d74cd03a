"""What a policy gives its agent, as words and names for cases: credentials, models, keys. Holds no secret."""

from __future__ import annotations

from typing import Any

from cloister.credentials.bindings import hosts_of
from cloister.egress import hosts
from cloister.egress.hosts import HostError
from cloister.egress.rules import compile_ruleset
from cloister.errors import CloisterError
from cloister.llm.upstreams import compile_upstream
from cloister.policy.merge import ResolvedAgent
from cloister.policy.model import Agent
from cloister.policy.variables import variables
from cloister.prove.known_secrets import named
from cloister.runs.login_files import describer, login_of, token_places
from cloister.runs.paths import Paths

_IDENTITY = 2082
"""Where the identity service listens unless it is told otherwise."""


def held(resolved: ResolvedAgent) -> frozenset[str]:
    """Return the words of what the policy has, as cases name them in IF_POLICY."""
    agent = resolved.agent
    credentials = agent.credentials.values()
    words = {
        "credentials": any(one.inject is not None for one in credentials),
        "keys": any(one.keys for one in credentials),
        "logins": any(login_of(reference) for _, reference in named(resolved)),
        "identity": bool(agent.identity.audiences),
        "models": bool(agent.llm.providers),
        "unit": agent.isolation == "unit",
        "microvm": agent.isolation == "microvm",
    }
    return frozenset(word for word, holds in words.items() if holds)


def opened(resolved: ResolvedAgent) -> dict[str, bool]:
    """Return what egress opens on purpose of things that cases try to reach."""
    places = [(host, port) for _, host, port in providers(resolved)]
    return {
        "egress.allow names the identity service": _allows(resolved, "host.cloister.internal", _IDENTITY),
        "egress.allow names a provider": any(_allows(resolved, host, port) for host, port in places),
    }


def facts(resolved: ResolvedAgent, user: Paths, own: Paths) -> dict[str, Any]:
    """Return what cases may know: names, places and variables, which the agent could find out as well."""
    from cloister.runs.prepare import TOKEN_VARIABLE  # it loads the C library, which listing cases does not need

    agent = resolved.agent
    return {
        "credentials": [
            {
                "name": name,
                "variables": variables(one),
                "scheme": one.inject.scheme,
                "places": [[host.lower().rstrip("."), one.inject.port] for host in hosts_of(one.inject)],
            }
            for name, one in agent.credentials.items()
            if one.secret and one.inject is not None
        ],
        "token_places": _token_places(agent, user),
        "providers": [list(one) for one in providers(resolved)],
        "models": list(agent.llm.models),
        "model_key": TOKEN_VARIABLE,
        "given_variables": _given(resolved),
        "plain_hosts": [rule for rule in agent.egress.allow if isinstance(rule, str) and rule.endswith(":80")],
        "tops": ["/"],
        "secret_stores": [path for paths in (user, own) for path in _stores(paths)],
        "identity_sockets": [f"{paths.runtime}/identity.sock" for paths in (user, own)],
    }


def providers(resolved: ResolvedAgent) -> list[tuple[str, str, int]]:
    """Return protocol, host and port of the agent's providers."""
    found: list[tuple[str, str, int]] = []
    for name in resolved.agent.llm.providers:
        provider = resolved.policy.providers.get(name)
        if provider is not None:
            upstream = compile_upstream(name, provider)
            found.append((provider.protocol, upstream.host, upstream.port))
    return found


def _allows(resolved: ResolvedAgent, name: str, port: int) -> bool:
    """Tell whether a rule of egress speaks of a place; a mode that is wider than a list allows everything."""
    agent = resolved.agent
    added = resolved.preset.hosts if agent.egress.preset_hosts else ()
    try:
        rules = compile_ruleset(agent.egress, tuple(added)).allow.about(hosts.parse_host(name))
    except (CloisterError, HostError):
        return False
    return any(rule.port in (None, port) for rule in rules)


def _token_places(agent: Agent, user: Paths) -> list[list[Any]]:
    try:
        return [list(place) for place in sorted(token_places(agent, describer(user.logins)))]
    except CloisterError:
        return []  # the run itself says what is wrong with the login


def _given(resolved: ResolvedAgent) -> list[str]:
    """Return variables that the policy sets, so that they are no leak of the caller's."""
    agent = resolved.agent
    names = [name for one in agent.credentials.values() for name in variables(one)]
    names += ["SSH_AUTH_SOCK"] if any(one.keys for one in agent.credentials.values()) else []
    return sorted({*names, *agent.environment, *resolved.preset.environment})


def _stores(paths: Paths) -> list[str]:
    """Return the files and directories that hold secrets, books and switches."""
    state = ("authority/authority.pem", "identity/store.json", "identity/master.key", "ledger/ledger.db",
             "ledger/journal-1.log", "logins", "placeholders.jsonl", "blocked.json")  # fmt: skip
    return [*(f"{paths.state}/{name}" for name in state), f"{paths.config}/prices.toml", paths.decisions]
