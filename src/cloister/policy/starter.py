"""The first policy of a user, as `cloister init` writes it: commented, and strict.

Pure: which agents are installed and which variables are set is told to it. What it returns
always loads without a mistake (a test loads every combination).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cloister.policy.model import Preset

_HEAD = """\
# What agents may do on this machine. Manual: cloister.toml(5).
# Check it with `cloister check`; see what it means with `cloister plan AGENT`.
# What is not written here is not allowed.
schema = 1
"""

_KEYS = """
# The model key. Everything in the sandbox can read this variable and could send it to any host
# that is allowed below. Use a key with a spending limit, made for this agent alone.
pass_environment = [{names}]
"""

_NO_KEYS = """
# A model key reaches the agent by name of its variable. Everything in the sandbox can read it and
# could send it to any host that is allowed below. Use a key with a spending limit.
# pass_environment = ["{name}"]
"""

_EGRESS = """
[agents.{agent}.egress]
# deny: only the hosts below{preset_hosts}. ask: you are asked on the terminal for others.
mode = "deny"
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

_HOSTS = {
    "ANTHROPIC_API_KEY": "api.anthropic.com",
    "ANTHROPIC_OAUTH_TOKEN": "api.anthropic.com",
    "OPENAI_API_KEY": "api.openai.com",
    "GEMINI_API_KEY": "generativelanguage.googleapis.com",
    "OPENROUTER_API_KEY": "openrouter.ai",
}
"""The endpoint a key is for, where the product speaks to many and its preset names none."""


def starter(found: Collection[str], presets: Mapping[str, Preset], *, variables: Collection[str] = ()) -> str:
    """Return the text of a first policy.

    Args:
        found: names of presets whose program is on PATH; without any, an agent `shell` is written.
        presets: every preset, by name.
        variables: names of the variables set in the caller's environment; values are not needed.
    """
    names = sorted(set(found) & set(presets)) or ["shell"]
    return _HEAD + "".join(_agent(name, presets[name], variables) for name in names)


def _agent(name: str, preset: Preset, variables: Collection[str]) -> str:
    keys = [key for key in preset.key_environment if key in variables]
    hosts = [] if preset.hosts else sorted({_HOSTS[key] for key in keys if key in _HOSTS})
    if keys:
        key_text = _KEYS.format(names=_list(keys))
    elif preset.key_environment:
        key_text = _NO_KEYS.format(name=preset.key_environment[0])
    else:
        key_text = ""
    known = f", and the preset's ({', '.join(preset.hosts)})" if preset.hosts else ""
    about = f"# {preset.description}\n" if preset.description.isprintable() else ""
    return "".join(
        [
            f'\n{about}[agents.{name}]\npreset = "{name}"\n',
            key_text,
            _EGRESS.format(agent=name, hosts=_list(hosts), preset_hosts=known),
            _REST.format(agent=name),
        ]
    )


def _list(items: list[str]) -> str:
    return ", ".join(f'"{item}"' for item in items)
