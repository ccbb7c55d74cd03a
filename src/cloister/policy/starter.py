"""The first policy of a user, as `cloister init` writes it: commented, and strict.

Pure: which agents are installed and which variables are set is told to it. What it returns
always loads without a mistake (a test loads every combination).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from cloister.policy.model import Preset

_HEAD = """\
# What agents may do on this machine. Manual: cloister.toml(5).
# Check it with `cloister check`; see what it means with `cloister plan AGENT`.
# What is not written here is not allowed.
schema = 1
"""

_PROVIDER = """
# Where models are. Only Cloister reads the key; what runs inside gets a placeholder. Store it, readable for you alone:
#   {store}
{mark}[providers.{name}]
{mark}protocol = "{protocol}"
{mark}key = "file:{file}"
"""

_ISOLATION = """\
# In a virtual machine of its own, without root: cloister image build {image}, and this line.
# isolation = "microvm"
"""

_KEYS = """
# Everything in the sandbox can read this variable and could send it to any host that is allowed below.
pass_environment = [{names}]
"""

_LLM = """
# Its models, reached through Cloister: the key stays outside, and each call is counted (cloister usage).{login}
{mark}[agents.{agent}.llm]
{mark}providers = [{names}]
{models}
# cost_per_day_usd = 20.0
"""

_LOGIN = """
# With a subscription instead of a key: cloister login {preset}"""

_EGRESS = """
[agents.{agent}.egress]
# deny: only the hosts below{preset_hosts}. ask: you are asked on the terminal for others.
mode = "deny"{without}
allow = [{hosts}]
# Package registries are hosts like others, and a way out for data:
# allow = ["npm.example.org", "packages.example.org", "*.packages.example.org"]
"""

_REST = """
[agents.{agent}.workspace]
# direct: the agent writes to your files. overlay: nothing changes until `cloister apply`.
mode = "direct"
# Only start below these directories. Left out, any project directory will do.
# roots = ["~/src"]

[agents.{agent}.limits]
memory_max = "4G"
tasks_max = 1024
runtime_max = "12h"
"""


class Upstream(NamedTuple):
    """A provider of models, as a first policy names it."""

    name: str
    protocol: str
    model: str
    """One that a product which has to be told of models can begin with."""

    @property
    def file(self) -> str:
        """Where its key is kept."""
        return f"~/.config/cloister/{self.name}.key"


_ANTHROPIC = Upstream("anthropic", "anthropic", "claude-sonnet-5-5")
_OPENAI = Upstream("openai", "openai-responses", "gpt-6-sol")
_UPSTREAMS = {"ANTHROPIC_API_KEY": _ANTHROPIC, "OPENAI_API_KEY": _OPENAI, "CODEX_API_KEY": _OPENAI}
"""Whose key a variable holds."""

_TOKENS = frozenset({"ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_OAUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "CODEX_ACCESS_TOKEN"})
"""Variables with tokens of a login, which `cloister login` keeps outside."""

_HOSTS = {"GEMINI_API_KEY": "generativelanguage.googleapis.com", "OPENROUTER_API_KEY": "openrouter.ai"}
"""The endpoint of a key that still goes inside."""


def starter(found: Collection[str], presets: Mapping[str, Preset], *, variables: Collection[str] = ()) -> str:
    """Return the text of a first policy.

    Args:
        found: names of presets whose program is on PATH; without any, an agent `shell` is written.
        presets: every preset, by name.
        variables: names of the variables set in the caller's environment; values are not needed.
    """
    names = sorted(set(found) & set(presets)) or ["shell"]
    kept = {name: _upstreams(presets[name], variables) for name in names}
    used = dict.fromkeys(one for upstreams in kept.values() for one in upstreams)
    # What no agent has a key for yet is proposed behind a mark.
    proposed = dict.fromkeys(one for name in names if not kept[name] for one in _known(presets[name])[:1])
    providers = [_provider(one, variables, mark="") for one in used]
    providers += [_provider(one, variables, mark="# ") for one in proposed if one not in used]
    agents = [_agent(name, presets[name], kept[name], variables) for name in names]
    return _HEAD + "".join([*providers, *agents])


def how_to_store(name: str, variables: Collection[str]) -> str:
    """Return the command that stores the key of a provider of the first policy; empty for any other provider."""
    one = next((one for one in _UPSTREAMS.values() if one.name == name), None)
    if one is None:
        return ""
    variable = next((key for key, value in _UPSTREAMS.items() if value == one and key in variables), "")
    if variable:
        return f"(umask 077; printenv {variable} > {one.file})"
    return f"(umask 077; cat > {one.file})    and paste it, then Enter and Ctrl-D"


def _known(preset: Preset) -> list[Upstream]:
    """Return the providers that a product takes a key of and can be pointed at."""
    spoken = {*preset.base_url, *preset.base_url_arguments, *preset.model_providers}
    found = [_UPSTREAMS[key] for key in preset.key_environment if key in _UPSTREAMS]
    return [one for one in dict.fromkeys(found) if one.protocol in spoken]


def _upstreams(preset: Preset, variables: Collection[str]) -> list[Upstream]:
    """Return those of them whose key the caller has."""
    had = {_UPSTREAMS[key] for key in preset.key_environment if key in _UPSTREAMS and key in variables}
    return [one for one in _known(preset) if one in had]


def _provider(one: Upstream, variables: Collection[str], *, mark: str) -> str:
    store = how_to_store(one.name, variables)
    return _PROVIDER.format(mark=mark, name=one.name, protocol=one.protocol, file=one.file, store=store)


def _agent(name: str, preset: Preset, upstreams: list[Upstream], variables: Collection[str]) -> str:
    outside = {*_UPSTREAMS, *_TOKENS}
    keys = [key for key in preset.key_environment if key in variables and key not in outside]
    hosts = [] if preset.hosts else sorted({_HOSTS[key] for key in keys if key in _HOSTS})
    known = f", and the preset's ({', '.join(preset.hosts)})" if preset.hosts and not upstreams else ""
    without = "\npreset_hosts = false" if preset.hosts and upstreams else ""
    about = f"# {preset.description}\n" if preset.description.isprintable() else ""
    return "".join(
        [
            f'\n{about}[agents.{name}]\npreset = "{name}"\n',
            _ISOLATION.format(image=preset.image or "dev"),
            _KEYS.format(names=_list(keys)) if keys else "",
            _llm(name, preset, upstreams),
            _EGRESS.format(agent=name, hosts=_list(hosts), preset_hosts=known, without=without),
            _REST.format(agent=name),
        ]
    )


def _llm(name: str, preset: Preset, upstreams: list[Upstream]) -> str:
    """Return the table of its models; behind marks where the caller has no key for them."""
    proposed = upstreams or _known(preset)[:1]
    if not proposed:
        return ""
    mark = "" if upstreams else "# "
    patterns = {"anthropic": "claude-*", "openai": "gpt-*"}
    listed = [patterns[one.name] for one in proposed]
    if preset.model_files:
        listed = [word for one in proposed for word in (one.model, patterns[one.name])]
    models = f"models = [{_list(listed)}]"
    return _LLM.format(
        mark=mark,
        agent=name,
        names=_list([one.name for one in proposed]),
        models=f"{mark}{models}" if preset.model_files else f"# {models}",
        login=_LOGIN.format(preset=name) if preset.login else "",
    )


def _list(items: list[str]) -> str:
    return ", ".join(f'"{item}"' for item in items)
