"""Whether the values of a policy may stand together: names, references, limits, collisions.

`load` has made sure of form (known keys, types); this judges meaning, and notes every
mistake with its path. It judges a policy by itself: what a host can enforce is for the
compiler, and what a project file may change is for `tighten`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import get_args

from cloister.policy import values
from cloister.policy.document import Mistakes
from cloister.policy.hosts import HOST_LOOPBACK, parse_rule
from cloister.policy.injection_check import check_injection
from cloister.policy.login_check import check_login
from cloister.policy.model import (
    Agent,
    Audit,
    Credential,
    Egress,
    EgressRule,
    Identity,
    Llm,
    Policy,
    Preset,
    Project,
    Protocol,
    Provider,
    User,
)
from cloister.policy.scanner import Path
from cloister.policy.service_check import check_services
from cloister.policy.settings_check import mistakes_of
from cloister.policy.units import parse_cpu, parse_duration, parse_size
from cloister.policy.variables import KEY_VARIABLES, collisions

PROTOCOLS = frozenset(get_args(Protocol))

_KEY_REMEDY = 'put it into a file with mode 0600 and write "file:~/.config/cloister/NAME.key"'


class _Check:
    """The mistakes of one document, and how to note what a parser says about a value."""

    def __init__(self, mistakes: Mistakes) -> None:
        self.add = mistakes.add

    def value(self, path: Path, parser: Callable[[str], object], value: str, remedy: str = "") -> None:
        try:
            parser(value)
        except ValueError as error:
            self.add(path, str(error), remedy)

    def optional(self, path: Path, parser: Callable[[str], object], value: str) -> None:
        if value:
            self.value(path, parser, value)

    def each(self, path: Path, parser: Callable[[str], object], found: Iterable[str]) -> None:
        for index, value in enumerate(found):
            self.value((*path, index), parser, value)

    def known(self, path: Path, names: Iterable[str], known: Iterable[str], what: str) -> None:
        known = sorted(known)
        for index, name in enumerate(names):
            if name not in known:
                close = get_close_matches(name, known, n=1)
                remedy = f"did you mean {close[0]}?" if close else _one_of(known, what)
                self.add((*path, index), f"there is no {what} of this name", remedy)


def check_policy(policy: Policy, mistakes: Mistakes, *, preset_names: Iterable[str] | None = None) -> None:
    """Note every mistake of meaning, then raise `PolicyError` (`policy-invalid`) if there was one."""
    check = _Check(mistakes)
    presets = None if preset_names is None else sorted(preset_names)
    for name, provider in policy.providers.items():
        at: Path = ("providers", name)
        check.value(at, values.check_name, name)
        check.optional((*at, "base_url"), values.check_base_url, provider.base_url)
        if provider.key:
            check.value((*at, "key"), values.check_reference, provider.key, _KEY_REMEDY)
        _check_provider(check, at, provider)
    for table, agents in (("agents", policy.agents), ("profiles", policy.profiles)):
        for name, agent in agents.items():
            check.value((table, name), values.check_name, name)
            _check_agent(check, (table, name), agent)
            check.known((table, name, "llm", "providers"), agent.llm.providers, policy.providers, "provider")
            if presets is not None and agent.preset and agent.preset not in presets:
                check.add((table, name, "preset"), "there is no preset of this name", _one_of(presets, "preset"))
    for name, agent in policy.agents.items():
        if not agent.preset and not agent.command:
            check.add(("agents", name), "neither preset nor command says what to run", 'command = ["PROGRAM"]')
    check_services(policy, mistakes)
    _check_users(check, policy)
    check.value(("audit", "retention"), parse_duration, policy.audit.retention)
    check.value(("audit", "rotate_every"), parse_duration, policy.audit.rotate_every)
    check.value(("audit", "rotate_size"), values.check_segment, policy.audit.rotate_size)
    _check_export(check, policy.audit)
    check.value(("ledger", "retention"), parse_duration, policy.ledger.retention)
    if policy.ledger.database:
        remedy = 'put the address into a file with mode 0600 and write "file:~/.config/cloister/ledger.url"'
        check.value(("ledger", "database"), values.check_reference, policy.ledger.database, remedy)
    check.each(("images", "trust"), values.check_public_key, policy.images.trust)
    check.optional(("images", "store"), values.check_host_path, policy.images.store)
    check.optional(("microvm", "bridge"), values.check_bridge, policy.microvm.bridge)
    check.each(("microvm", "users"), values.check_user, policy.microvm.users)
    mistakes.settle()


def _check_export(check: _Check, audit: Audit) -> None:
    check.optional(("audit", "syslog"), values.check_syslog, audit.syslog)
    check.optional(("audit", "otlp"), values.check_otlp, audit.otlp)
    check.optional(("audit", "alarm"), values.check_alarm, audit.alarm)
    for key in ("ca", "certificate"):
        check.optional(("audit", key), values.check_file_path, getattr(audit, key))


def check_project(project: Project, mistakes: Mistakes) -> None:
    """Note every mistake of meaning in a project file; raise like `check_policy`."""
    check = _Check(mistakes)
    _check_agent(check, ("every_agent",), project.every_agent)
    for name, agent in project.agents.items():
        check.value(("agents", name), values.check_name, name)
        _check_agent(check, ("agents", name), agent)
    mistakes.settle()


def check_preset(preset: Preset, mistakes: Mistakes) -> None:
    """Note every mistake of meaning in a preset; raise like `check_policy`."""
    check = _Check(mistakes)
    for key in ("state", "carry", "secrets", "protect"):
        check.each((key,), values.check_inner_path, getattr(preset, key))
    for key in ("pass_environment", "key_environment"):
        check.each((key,), values.check_variable, getattr(preset, key))
    for key, files in (("files", preset.files), ("seed", preset.seed), ("model_files", preset.model_files)):
        for path, content in files.items():
            check.value((key, path), values.check_inner_path, path)
            check.value((key, path), values.check_plain_value, content)
    _check_endpoints(check, preset)
    check.optional(("unix_socket",), values.check_variable, preset.unix_socket)
    for key in ("note_file", "settings", "environment_file"):
        check.optional((key,), values.check_inner_path, getattr(preset, key))
    if preset.note and not any("{note}" in argument for argument in preset.note):
        check.add(("note",), "no argument holds {note}")
    _check_environment(check, (), preset.environment)
    _check_rules(check, ("hosts",), preset.hosts)
    check_login(preset.login, mistakes)
    mistakes.settle()


def _check_endpoints(check: _Check, preset: Preset) -> None:
    for protocol, name in preset.base_url.items():
        check.value(("base_url", protocol), values.check_variable, name)
    for protocol, names in preset.placeholder.items():
        check.each(("placeholder", protocol), values.check_variable, names)
    for protocol, arguments in preset.base_url_arguments.items():
        if not any("{base_url}" in argument for argument in arguments):
            check.add(("base_url_arguments", protocol), "no argument holds {base_url}")
    for protocol, entries in preset.model_providers.items():
        check.each(("model_providers", protocol), values.check_plain_value, entries)
    named = {*preset.base_url, *preset.base_url_arguments, *preset.placeholder, *preset.model_providers}
    for protocol in sorted(named - PROTOCOLS):
        check.add((), f"{protocol[:40]!r} is no protocol", f"one of {', '.join(sorted(PROTOCOLS))}")


def _check_agent(check: _Check, at: Path, agent: Agent) -> None:
    if agent.command and not agent.command[0]:
        check.add((*at, "command", 0), "the program has no name")
    for index, argument in enumerate(agent.command):
        check.value((*at, "command", index), values.check_plain_value, argument)
    _check_environment(check, at, agent.environment)
    check.each((*at, "pass_environment"), values.check_variable, agent.pass_environment)
    check.each((*at, "environment_files"), values.check_file_path, agent.environment_files)
    for path, why in mistakes_of(agent.settings, (*at, "settings")):
        check.add(path, why, "keep it out of the policy, or use credentials")
    check.each((*at, "carry"), values.check_home_path, agent.carry)
    check.each((*at, "workspace", "roots"), values.check_host_path, agent.workspace.roots)
    check.each((*at, "workspace", "protect"), values.check_inner_path, agent.workspace.protect)
    check.each((*at, "workspace", "unprotected"), values.check_inner_path, agent.workspace.unprotected)
    check.each((*at, "filesystem", "read"), values.check_read_path, agent.filesystem.read)
    check.each((*at, "filesystem", "write"), values.check_write_path, agent.filesystem.write)
    check.each((*at, "filesystem", "hide"), values.check_host_path, agent.filesystem.hide)
    check.each((*at, "agent_sandbox", "deny_read"), values.check_host_path, agent.agent_sandbox.deny_read)
    _check_egress(check, (*at, "egress"), agent.egress)
    for name, credential in agent.credentials.items():
        check.value((*at, "credentials", name), values.check_name, name)
        _check_credential(check, (*at, "credentials", name), credential)
    for path, why in collisions(agent):
        check.add((*at, *path), why, "give each variable to one of them")
    _check_llm(check, (*at, "llm"), agent.llm)
    _check_identity(check, (*at, "identity"), agent.identity)
    for key in ("memory_max", "disk_max"):
        check.optional((*at, "limits", key), parse_size, getattr(agent.limits, key))
    check.optional((*at, "limits", "cpu_quota"), parse_cpu, agent.limits.cpu_quota)
    check.optional((*at, "limits", "runtime_max"), parse_duration, agent.limits.runtime_max)
    for key in ("memory", "disk", "disk_rate"):
        check.optional((*at, "microvm", key), parse_size, getattr(agent.microvm, key))
    check.optional((*at, "microvm", "image"), values.check_name, agent.microvm.image)


def _check_environment(check: _Check, at: Path, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        check.value((*at, "environment", name), values.check_variable, name)
        remedy = "keep it out of the policy: use credentials, or pass_environment for a variable of yours"
        check.value((*at, "environment", name), values.check_plain_value, value, remedy)


def _check_egress(check: _Check, at: Path, egress: Egress) -> None:
    _check_rules(check, (*at, "allow"), egress.allow)
    _check_rules(check, (*at, "deny"), egress.deny, deny=True)
    check.each((*at, "private"), values.check_network, egress.private)
    check.optional((*at, "upstream_proxy"), values.check_upstream_proxy, egress.upstream_proxy)


def _check_rules(check: _Check, at: Path, rules: Iterable[str | EgressRule], *, deny: bool = False) -> None:
    for index, entry in enumerate(rules):
        try:
            rule = parse_rule(entry, deny=deny)
        except ValueError as error:
            check.add((*at, index), str(error))
            continue
        unnamed = entry.port is None if isinstance(entry, EgressRule) else not entry.endswith(f":{rule.port}")
        if rule.host == HOST_LOOPBACK and unnamed and not deny:
            check.add((*at, index), "a rule for the host's own loopback names its port", f"{HOST_LOOPBACK}:8080")


def _check_provider(check: _Check, at: Path, provider: Provider) -> None:
    for name, value in provider.headers.items():
        check.value((*at, "headers", name), values.check_header, name)
        check.value((*at, "headers", name), values.check_plain_value, value, _KEY_REMEDY)
        if not value.isprintable() or not value.isascii():
            check.add((*at, "headers", name), "a header's value is visible ASCII")
    for key in ("connect_timeout", "first_byte_timeout", "idle_timeout"):
        check.value((*at, key), parse_duration, getattr(provider, key))
    if provider.auth == "sigv4" and not provider.region:
        check.add(at, "sigv4 signs for a region", 'region = "us-east-1"')
    if provider.auth == "none" and provider.key:
        check.add((*at, "key"), 'auth = "none" sends no key', "remove key, or auth")


def _check_llm(check: _Check, at: Path, llm: Llm) -> None:
    check.each((*at, "models"), values.check_model, llm.models)
    check.each((*at, "redact"), values.check_pattern, llm.redact)
    for name, model in llm.aliases.items():
        for text in (name, model):
            check.value((*at, "aliases", name), values.check_model, text)
            if any(sign in text for sign in "*?"):
                check.add((*at, "aliases", name), "an alias names one model, not a pattern")


def _check_identity(check: _Check, at: Path, identity: Identity) -> None:
    check.each((*at, "audiences"), values.check_audience, identity.audiences)
    check.value((*at, "lifetime"), _check_lifetime, identity.lifetime)


def _check_lifetime(text: str) -> None:
    if not 60 <= parse_duration(text) <= 900:  # noqa: PLR2004
        raise ValueError("a token lives from 1m to 15m: what is short need not be called back")


def _check_credential(check: _Check, at: Path, credential: Credential) -> None:
    if credential.keys:
        _check_keys(check, at, credential)
        return
    if credential.hosts:
        check.add((*at, "hosts"), "hosts belong to keys; a secret is bound by inject.host")
    check.value((*at, "secret"), values.check_reference, credential.secret, _KEY_REMEDY)
    check.optional((*at, "env"), values.check_variable, credential.env)
    if credential.inject is not None:
        check_injection(check.add, (*at, "inject"), credential.inject)
        if credential.inject.scheme == "sigv4" and credential.env:
            check.add((*at, "env"), f"sigv4 sets {' and '.join(KEY_VARIABLES)} by itself", "remove env")


def _check_keys(check: _Check, at: Path, credential: Credential) -> None:
    for index, key in enumerate(credential.keys):
        check.value((*at, "keys", index), values.check_key, key, "ssh-add -l shows them, and gpg -K")
    for key in ("secret", "inject", "env"):
        if getattr(credential, key):
            check.add((*at, key), "keys stay in your agent: they need neither secret, inject nor env", f"remove {key}")
    if not credential.uses:
        check.add((*at, "uses"), "no use is named", 'uses = ["ssh"]')
    _check_kinds(check, at, credential)
    if "ssh" in credential.uses and not credential.hosts:
        check.add((*at, "hosts"), "logging in needs the hosts it is for", 'hosts = ["github.com"]')
    for index, host in enumerate(credential.hosts):
        try:
            if parse_rule(host).kind != "name":
                check.add((*at, "hosts", index), "a key is bound to names, not to wildcards or addresses")
        except ValueError as error:
            check.add((*at, "hosts", index), str(error))


def _check_kinds(check: _Check, at: Path, credential: Credential) -> None:
    """Refuse keys that no use is for, and uses that no key is for: they would say something and do nothing."""
    by_gpg = [key.startswith("gpg:") for key in credential.keys]
    for kind, here, uses in (("gpg", any(by_gpg), {"gpg"}), ("ssh", not all(by_gpg), {"ssh", "git"})):
        used = uses & set(credential.uses)
        if here and not used:
            check.add((*at, "uses"), f"a {kind} key is named, and no use for it", f"add {' or '.join(sorted(uses))}")
        if used and not here:
            check.add((*at, "keys"), f"no {kind} key is named, and {', '.join(sorted(used))} among its uses")


def _check_users(check: _Check, policy: Policy) -> None:
    for name, user in policy.users.items():
        at: Path = ("users", name)
        check.value(at, values.check_user, name)
        if not user.agents:
            check.add(at, "the user may start no agent", 'agents = ["NAME"], or delete the table')
        if not user.roots:
            check.add(at, "the user has no directory to start an agent in", 'roots = ["~/src"]')
        check.known((*at, "agents"), user.agents, policy.agents, "agent")
        check.each((*at, "roots"), values.check_host_path, user.roots)
        _check_config(check, (*at, "config"), user)


def _check_config(check: _Check, at: Path, user: User) -> None:
    if isinstance(user.config, str):
        check.optional(at, values.check_home_path, user.config)
        return
    for agent, directory in user.config.items():
        check.value((*at, agent), values.check_home_path, directory)
        if agent not in user.agents:
            check.add((*at, agent), "the user may not start this agent", _one_of(sorted(user.agents), "agent"))


def _one_of(known: list[str], what: str) -> str:
    return f"one of {', '.join(known[:12])}" if known else f"define the {what} first"
