"""The configuration of one OpenClaw gateway, made of its service's keys. Pure: values in, a JSON value out.

In the words of OpenClaw 2026.9 (`openclaw config schema`). No secret stands in it: OpenClaw reads each from a file
that systemd makes for the unit (LoadCredential=), which is regular, private and has one link, as OpenClaw asks of
such files; for models and channels it holds a placeholder. What the gateway thinks of the result, `openclaw config
validate` says before it is started with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cloister.isolation.environment import PROXY, model_url
from cloister.policy.merge import merge
from cloister.policy.model import Agent, Provider
from cloister.policy.service_check import SECRET
from cloister.policy.service_instances import Gateway
from cloister.policy.services import DEFAULT_MODEL, Instance, Telegram
from cloister.runs.channel_secrets import TELEGRAM_SECRET, named, swapped

GATEWAY_SECRET = "gateway"  # noqa: S105 - a name
MODEL_KEY = "model-key"
"""Names of credentials of the unit. The last one is the system's broker's: what opens the proxy for models inside."""

_API = {"anthropic": "anthropic-messages", "openai": "openai-completions", "openai-responses": "openai-responses"}
_QUEUE = {"queue": "followup"}
"""What OpenClaw calls now what was once its `queue`."""


class Places(NamedTuple):
    """Where things are in the gateway's sandbox."""

    workspace: str
    credentials: str
    """The directory in which systemd puts the unit's credentials."""


def delivered_secrets(settings: Instance, *, product: bool = True) -> dict[str, str]:
    """Return the references of all secrets that come inside, by the credential's name: it compares its own token."""
    found = {GATEWAY_SECRET: getattr(settings.auth, settings.auth.mode)} if product else {}
    return found | {named(name): one for name, one in settings.secrets.items() if isinstance(one, str)}


def served_providers(agent: Agent, providers: Mapping[str, Provider]) -> dict[str, Provider]:
    """Return those providers that calls go to: the first of each protocol, as `llm` orders them."""
    first: dict[str, str] = {}
    for name in agent.llm.providers:
        first.setdefault(providers[name].protocol, name)
    return {name: providers[name] for name in first.values()}


def openclaw_config(
    gateway: Gateway, agent: Agent, providers: Mapping[str, Provider], places: Places
) -> dict[str, Any]:
    """Return a gateway's whole configuration: base, then telegram, then routing, then `config_overrides` on top.

    Args:
        gateway: a service's instance that was checked.
        agent: its agent, with the preset folded in.
        providers: `[providers]` of the policy.
        places: where its workspace and credentials are.
    """
    settings = gateway.settings
    config = _base(settings, agent, providers, places)
    secrets = {name: _file(places, name) for name in (*delivered_secrets(settings), *swapped(settings))}
    if providers and agent.llm.providers:
        secrets[MODEL_KEY] = _file(places, MODEL_KEY)
    config["secrets"] = {"providers": secrets}
    if settings.channels.telegram.enable:
        config = merge(config, {"channels": {"telegram": _telegram(settings.channels.telegram, places)}})
    config = merge(config, {"channels": settings.channels.other} if settings.channels.other else {})
    queue = settings.routing.queue
    by_channel = {channel: _QUEUE.get(mode, mode) for channel, mode in queue.by_channel.items()}
    config = merge(
        config, {"messages": {"queue": {"mode": _QUEUE.get(queue.mode, queue.mode), "byChannel": by_channel}}}
    )
    filled: dict[str, Any] = _filled(merge(config, settings.config_overrides))
    return filled


def _base(settings: Instance, agent: Agent, providers: Mapping[str, Provider], places: Places) -> dict[str, Any]:
    served = served_providers(agent, providers)
    config: dict[str, Any] = {
        "gateway": {
            "mode": "local",
            "bind": "loopback",
            "port": settings.port,
            "auth": {"mode": settings.auth.mode, settings.auth.mode: _reference(GATEWAY_SECRET)},
            # What `cloister status` asks, to know more than that a process lives.
            "http": {"endpoints": {"chatCompletions": {"enabled": True}}},
        },
        "agents": {
            "defaults": {"workspace": places.workspace, "thinkingDefault": settings.model.thinking},
            "entries": {"main": {}},
        },
        "discovery": {"mdns": {"mode": "off"}},
        "update": {"checkOnStart": False},
        "proxy": {"proxyUrl": PROXY, "loopbackMode": "gateway-only"},
    }
    if served or settings.model.primary != DEFAULT_MODEL:
        config["agents"]["defaults"]["model"] = {"primary": settings.model.primary}
    if served:
        config["models"] = {
            "providers": {name: _provider(name, each, settings, agent) for name, each in served.items()}
        }
    return config


def _provider(name: str, provider: Provider, settings: Instance, agent: Agent) -> dict[str, Any]:
    """Return OpenClaw's entry for a provider: our proxy in its place, and a placeholder for its key."""
    primary_provider, _, primary = settings.model.primary.partition("/")
    exact = [model for model in agent.llm.models if not any(sign in model for sign in "*?")]
    models = dict.fromkeys([*([primary] if primary_provider == name else []), *exact])
    return {
        "baseUrl": model_url(provider.protocol),
        "api": _API[provider.protocol],
        "apiKey": _reference(MODEL_KEY),
        "models": [{"id": model, "name": model} for model in models],
    }


def _telegram(telegram: Telegram, places: Places) -> dict[str, Any]:
    return {
        "enabled": True,
        "tokenFile": f"{places.credentials}/{TELEGRAM_SECRET}",
        "apiRoot": telegram.api_root,
        "dmPolicy": telegram.dm_policy,
        "allowFrom": list(telegram.allow_from),
        "groups": telegram.groups,
    }


def _file(places: Places, name: str) -> dict[str, Any]:
    return {"source": "file", "path": f"{places.credentials}/{name}", "mode": "singleValue"}


def _reference(name: str) -> dict[str, str]:
    """Return what OpenClaw calls a SecretRef: the provider that is a file of one value."""
    return {"source": "file", "provider": name, "id": "value"}


def _filled(value: Any) -> Any:
    """Put a reference in the place of each `{secret:NAME}`."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item) for item in value]
    found = SECRET.fullmatch(value) if isinstance(value, str) else None
    return _reference(named(found[1])) if found else value
