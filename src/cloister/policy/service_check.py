"""Whether what `[services]` says may stand together: every condition on gateways, each with the path of its instance.

What the host must have for it (directories of documents, programs) is looked at when a system is set up
(`runs/service_files.py`), what a gateway thinks of its own configuration by the gateway itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any
from urllib.parse import urlsplit

from cloister.policy import values
from cloister.policy.document import Mistakes
from cloister.policy.hosts import parse_rule
from cloister.policy.injection_check import check_injection
from cloister.policy.model import Agent, Policy, Provider
from cloister.policy.scanner import Path
from cloister.policy.service_instances import Gateway, service_gateways
from cloister.policy.services import DEFAULT_MODEL, Instance, ServiceSecret, Skill

DISTANCE = 120
"""OpenClaw derives ports +2 to +110 from its own: two gateways need this much between them."""
PRODUCT = "openclaw"
"""The preset whose configuration is made of the keys of a service."""
SECRET = re.compile(r"\{secret:([^{}]*)\}")

_REFERENCE_REMEDY = 'put it into a file of root\'s with mode 0600 and write "file:/etc/cloister/keys/NAME"'
_SKILL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PROGRAM = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9._+-]{0,63}")
_READY = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]{0,200}")
_OWN_KEYS = (
    (("gateway", "auth"), "auth"),
    (("gateway", "port"), "port"),
    (("gateway", "bind"), "port: it is served on 127.0.0.1 only"),
    (("gateway", "mode"), "nothing: it is local"),
    (("channels", "telegram", "tokenFile"), "channels.telegram.bot_token"),
    (("channels", "telegram", "botToken"), "channels.telegram.bot_token"),
    (("channels", "telegram", "apiRoot"), "channels.telegram.api_root"),
    (("agents", "defaults", "workspace"), "nothing: the workspace has its place"),
)
_ANYBODY = "*"


class Noted:
    """The mistakes of the policy, and the shapes of values."""

    def __init__(self, mistakes: Mistakes) -> None:
        """Note into these."""
        self.add = mistakes.add

    def reference(self, path: Path, text: str) -> None:
        """Refuse what systemd cannot deliver as a credential: it reads secrets for a service, before there is one."""
        try:
            values.check_reference(text)
        except ValueError as error:
            self.add(path, str(error), _REFERENCE_REMEDY)
            return
        if not text.startswith(("file:/", "systemd:")):
            self.add(
                path, "a service's secrets are file:/PATH or systemd:NAME: nobody is there to ask", _REFERENCE_REMEDY
            )

    def free(self, path: Path, value: object, secrets: Mapping[str, object]) -> None:
        """Refuse in a free table what JSON cannot hold, what looks like a secret, and `{secret:NAME}` of no secret."""
        for at, leaf in _leaves(path, value):
            if isinstance(leaf, str):
                try:
                    values.check_plain_value(leaf)
                except ValueError as error:
                    self.add(at, str(error), "name it in secrets, and write {secret:NAME} here")
                for name in SECRET.findall(leaf):
                    if leaf != f"{{secret:{name}}}":
                        self.add(at, "{secret:NAME} stands for a whole value, not for a part of one")
                    elif name not in secrets:
                        self.add(
                            at, f"secrets has no {name[:40]!r}", f'secrets.{name[:40]} = "file:/etc/cloister/keys/…"'
                        )
            elif not isinstance(leaf, bool | int | float):
                self.add(at, "dates and times have no place in a gateway's configuration: write text")


def check_services(policy: Policy, mistakes: Mistakes) -> None:
    """Note every mistake of meaning in `[services]`; services with mistakes of form are left for later."""
    noted = Noted(mistakes)
    found: list[Gateway] = []
    for name in policy.services:
        if any(path[:2] == ("services", name) for path in mistakes.paths):
            continue
        _named(noted, ("services", name), name)
        for gateway in service_gateways(name, mistakes.document.tables["services"][name]):
            if gateway.path[-2:-1] == ("instances",):
                _named(noted, gateway.path, gateway.name)
            found.append(gateway)
    for gateway in found:
        agent = policy.agents.get(gateway.settings.agent)
        if agent is None:
            known = ", ".join(sorted(policy.agents)[:12])
            what = (
                f"there is no agent {gateway.settings.agent[:40]!r}" if gateway.settings.agent else "agent is missing"
            )
            noted.add((*gateway.path, "agent"), what, f"one of {known}" if known else "write [agents.NAME] first")
            continue
        if agent.isolation != "unit":
            noted.add((*gateway.path, "agent"), *_not_a_unit(gateway.settings.agent, agent.isolation))
        _check_gateway(noted, gateway, agent, policy.providers)
    _check_ports(noted, policy, found)
    for joined, count in Counter(gateway.joined for gateway in found).items():
        if count > 1:
            at = next(gateway.path for gateway in found if gateway.joined == joined)
            noted.add(at, f"two gateways would both be called {joined}", "rename one of them")


def _not_a_unit(name: str, isolation: str) -> tuple[str, str]:
    remedy = f'[agents.{name}] isolation = "unit"'
    if isolation == "microvm":
        remedy += f"; a gateway in a guest is a run of yours, without [services]: cloister vm start {name}"
    return f"a service needs a system user of its own, and the agent has isolation = {isolation!r}", remedy


def _named(noted: Noted, path: Path, name: str) -> None:
    try:
        values.check_name(name)
    except ValueError as error:
        noted.add(path, str(error))


def _check_ports(noted: Noted, policy: Policy, found: Iterable[Gateway]) -> None:
    for one, two in combinations(found, 2):
        first, second = one.settings.port, two.settings.port
        both = all(_is_product(policy, each) for each in (one, two))
        if first == second or (both and abs(first - second) < DISTANCE):
            what = "the same port as" if first == second else f"less than {DISTANCE} ports from"
            free = max(each.settings.port for each in found) + (DISTANCE if both else 1)
            path = (*two.path, "port")
            noted.add(path, f"{second} is {what} that of the gateway {one.label}", f"port = {free}")


def _is_product(policy: Policy, gateway: Gateway) -> bool:
    agent = policy.agents.get(gateway.settings.agent)
    return agent is not None and agent.preset == PRODUCT


def _check_gateway(noted: Noted, gateway: Gateway, agent: Agent, providers: Mapping[str, Provider]) -> None:
    at, settings = gateway.path, gateway.settings
    for name, secret in settings.secrets.items():
        path = (*at, "secrets", name)
        _named(noted, path, name)
        if isinstance(secret, ServiceSecret):
            noted.reference((*path, "secret"), secret.secret)
            check_injection(noted.add, (*path, "inject"), secret.inject)
        else:
            noted.reference(path, secret)
    if agent.preset == PRODUCT:
        _check_model(noted, at, settings, agent, providers)
        _check_auth(noted, at, settings)
        _check_telegram(noted, at, settings)
        _check_free(noted, at, settings)
    else:
        for key in ("model", "channels", "auth", "routing", "documents", "skills", "plugins", "config_overrides"):
            if getattr(settings, key) != getattr(Instance(), key):
                noted.add((*at, key), f'{key} needs an agent with preset = "{PRODUCT}": no other has such a thing')
    if settings.ready and (agent.preset == PRODUCT or not _READY.fullmatch(settings.ready)):
        what = "OpenClaw is asked through its model" if agent.preset == PRODUCT else "this is a path, such as /healthz"
        noted.add((*at, "ready"), what, "remove ready" if agent.preset == PRODUCT else 'ready = "/healthz"')
    _check_skills(noted, at, settings.skills)
    _check_plugins(noted, at, settings)
    _check_environment(noted, at, settings)
    _check_tools(noted, at, settings)
    _check_documents(noted, at, settings)


def _check_model(noted: Noted, at: Path, settings: Instance, agent: Agent, providers: Mapping[str, Provider]) -> None:
    """Providers are optional (somebody may have a subscription of another kind), but a named one must be there."""
    provider, _, model = settings.model.primary.partition("/")
    path = (*at, "model", "primary")
    if not provider or not model:
        noted.add(path, "a model is PROVIDER/MODEL", f'primary = "{DEFAULT_MODEL}"')
        return
    try:
        values.check_model(model)
    except ValueError as error:
        noted.add(path, str(error))
    usable = [name for name in agent.llm.providers if name in providers]
    if usable and provider not in usable:
        noted.add(path, f"the agent may not use a provider {provider[:40]!r}", f'primary = "{usable[0]}/MODEL"')
    elif usable:
        first = next(name for name in usable if providers[name].protocol == providers[provider].protocol)
        if first != provider:
            message = f"calls go to {first}, the agent's first provider of that protocol, not to {provider}"
            noted.add(path, message, f'primary = "{first}/MODEL"')


def _check_auth(noted: Noted, at: Path, settings: Instance) -> None:
    auth, mode = settings.auth, settings.auth.mode
    reference = getattr(auth, mode)
    if not reference:
        noted.add((*at, "auth", mode), f'mode = "{mode}" needs a {mode}', f'{mode} = "file:/etc/cloister/keys/gateway"')
    else:
        noted.reference((*at, "auth", mode), reference)
    other = "password" if mode == "token" else "token"
    if getattr(auth, other):
        noted.add((*at, "auth", other), f'mode = "{mode}" uses no {other}', f"remove {other}")


def _check_telegram(noted: Noted, at: Path, settings: Instance) -> None:
    telegram, path = settings.channels.telegram, (*at, "channels", "telegram")
    if not telegram.enable:
        return
    if not telegram.bot_token:
        remedy = 'bot_token = "file:/etc/cloister/keys/telegram"'
        noted.add((*path, "bot_token"), "telegram is enabled and has no bot_token", remedy)
    else:
        noted.reference((*path, "bot_token"), telegram.bot_token)
    if not _is_origin(telegram.api_root):
        remedy = 'api_root = "https://api.telegram.org"'
        noted.add((*path, "api_root"), "the token is bound to a host: https://NAME, with :PORT if needed", remedy)
    anybody = _ANYBODY in telegram.allow_from
    if telegram.dm_policy == "allowlist" and not telegram.allow_from:
        remedy = 'allow_from = [123456789], or dm_policy = "pairing"'
        noted.add((*path, "allow_from"), "telegram is enabled and nobody may talk to it", remedy)
    if (telegram.dm_policy == "open") != anybody:
        noted.add((*path, "allow_from"), 'dm_policy = "open" and allow_from = ["*"] belong together', "both or neither")
    noted.free((*path, "groups"), telegram.groups, settings.secrets)


def _is_origin(url: str) -> bool:
    """Say whether this is `https://NAME[:PORT]` and nothing more."""
    try:
        values.check_base_url(url)
        parts = urlsplit(url)
        return parts.scheme == "https" and not parts.path and parse_rule(parts.hostname or "").kind == "name"
    except ValueError:
        return False


def _check_free(noted: Noted, at: Path, settings: Instance) -> None:
    noted.free((*at, "channels", "other"), settings.channels.other, settings.secrets)
    if "telegram" in settings.channels.other:
        noted.add((*at, "channels", "other", "telegram"), "telegram has a table of its own", "channels.telegram")
    noted.free((*at, "config_overrides"), settings.config_overrides, settings.secrets)
    for key, instead in _OWN_KEYS:
        table: object = settings.config_overrides
        for part in key:
            table = table.get(part) if isinstance(table, dict) else None
        if table is not None:
            noted.add((*at, "config_overrides", *key), "Cloister sets this by itself", f"write {instead}")
    used = {name for free in (settings.channels.other, settings.config_overrides) for name in secrets_in(free)}
    for name in settings.secrets.keys() - used:
        noted.add((*at, "secrets", name), "nothing uses this secret", f"{{secret:{name}}}, or delete it")


def _check_skills(noted: Noted, at: Path, skills: tuple[Skill, ...]) -> None:
    names = [skill.name for skill in skills]
    for index, skill in enumerate(skills):
        path = (*at, "skills", index)
        if not _SKILL.fullmatch(skill.name):
            noted.add((*path, "name"), "the name of a skill has up to 64 letters, digits, _ and -")
        if skill.name in names[:index]:
            noted.add((*path, "name"), f"two skills are called {skill.name[:64]!r}", "rename one of them")
        if skill.mode == "copy" and not skill.source:
            noted.add(path, 'mode = "copy" needs a source', 'source = "/etc/cloister/skills/NAME", or mode = "inline"')
        if skill.mode == "inline" and skill.source:
            noted.add((*path, "source"), 'mode = "inline" uses no source', "remove source, or mode")
        if skill.mode == "copy" and (skill.body or skill.description or skill.homepage or skill.metadata):
            noted.add(path, 'mode = "copy" takes SKILL.md as it is', 'mode = "inline", or remove its other keys')
        if skill.source:
            _directory(noted, (*path, "source"), skill.source)
        for key in ("description", "homepage"):
            if not all(char.isprintable() for char in getattr(skill, key)):
                noted.add((*path, key), "this is one line of text")
        noted.free((*path, "metadata"), skill.metadata, {})


def _check_plugins(noted: Noted, at: Path, settings: Instance) -> None:
    for name, plugin in settings.plugins.items():
        path = (*at, "plugins", name)
        _named(noted, path, name)
        _directory(noted, (*path, "source"), plugin.source)
        for variable, reference in plugin.env.items():
            _variable(noted, (*path, "env", variable), variable)
            noted.reference((*path, "env", variable), reference)
        noted.free((*path, "settings"), plugin.settings, {})


def _check_environment(noted: Noted, at: Path, settings: Instance) -> None:
    for name, value in settings.environment.items():
        path = (*at, "environment", name)
        _variable(noted, path, name)
        try:
            values.check_plain_value(value)
        except ValueError as error:
            noted.add(path, str(error), "a variable is seen by every tool: name it in secrets instead")
        if "\n" in value:
            noted.add(path, "a variable of a service is one line")
        if name.startswith(
            ("OPENCLAW_CONFIG", "OPENCLAW_STATE", "OPENCLAW_GATEWAY", "OPENCLAW_HOME", "OPENCLAW_INCLUDE")
        ):
            noted.add(path, "Cloister sets this variable itself")
    for index, file in enumerate(settings.environment_files):
        _directory(noted, (*at, "environment_files", index), file.removeprefix("-"))


def _check_tools(noted: Noted, at: Path, settings: Instance) -> None:
    for key in ("include", "exclude"):
        for index, name in enumerate(getattr(settings.tools, key)):
            if not _PROGRAM.fullmatch(name):
                noted.add((*at, "tools", key, index), "a tool is the name of a program, without a path")
    for name in set(settings.tools.include) & set(settings.tools.exclude):
        noted.add((*at, "tools", "exclude"), f"{name[:64]!r} is included as well")


def _check_documents(noted: Noted, at: Path, settings: Instance) -> None:
    documents, path = settings.documents, (*at, "documents")
    if documents.directory:
        _directory(noted, (*path, "directory"), documents.directory)
    elif documents.writable:
        noted.add((*path, "directory"), "no directory says what the documents are", "remove writable")
    for index, name in enumerate(documents.writable):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}\.md", name):
            noted.add((*path, "writable", index), "a document is a file of that directory, such as SOUL.md")


def _directory(noted: Noted, path: Path, text: str) -> None:
    try:
        values.check_host_path(text)
    except ValueError as error:
        noted.add(path, str(error))
        return
    if not text.startswith("/"):
        noted.add(path, "a service has no home of yours: write an absolute path")


def _variable(noted: Noted, path: Path, name: str) -> None:
    try:
        values.check_variable(name)
    except ValueError as error:
        noted.add(path, str(error))


def secrets_in(value: object) -> Iterator[str]:
    """Yield the names in all `{secret:NAME}` of a free table."""
    for _, leaf in _leaves((), value):
        if isinstance(leaf, str) and (found := SECRET.fullmatch(leaf)):
            yield found[1]


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves((*path, str(key)), item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves((*path, index), item)
    else:
        yield path, value
