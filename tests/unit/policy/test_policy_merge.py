"""Preset, agent and profile folded into one, and where each part was written."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.policy.document import read
from cloister.policy.merge import merge, resolve
from cloister.policy.model import Preset

PRESET = Preset(
    schema=1,
    command=("tool", "--quiet"),
    carry=(".tool/settings",),
    secrets=(".tool/auth.json", ".tool/models.json"),
    environment={"TOOL_HOME": "{home}/.tool", "TOOL_QUIET": "1"},
    pass_environment=("TOOL_MODEL",),
    hosts=("api.tool.example", "login.tool.example"),
    protect=(".tool",),
    netlink=False,
)
POLICY = """\
schema = 1
[agents.coder]
preset = "tool"
environment = { TOOL_QUIET = "0", EXTRA = "x" }
carry = ["~/.tool/models.json"]
[agents.coder.egress]
mode = "ask"
allow = ["a.example", "login.tool.example"]
[agents.coder.limits]
memory_max = "4G"
[profiles.narrow.egress]
allow = ["b.example"]
preset_hosts = false
[profiles.narrow.limits]
tasks_max = 9
[profiles.open.workspace]
unprotected = [".tool"]
"""


def resolved(profile=""):
    """Resolve the agent of the policy above."""
    return resolve(read(POLICY, "p.toml"), "coder", profile, presets={"tool": PRESET})


def test_tables_merge_and_everything_else_is_replaced():
    """The rule of merging, and that neither side is changed by it."""
    base = {"a": {"x": [1], "y": 1}, "b": 1}
    assert merge(base, {"a": {"x": [2]}, "c": 3}) == {"a": {"x": [2], "y": 1}, "b": 1, "c": 3}
    assert base == {"a": {"x": [1], "y": 1}, "b": 1}


def test_a_preset_adds_to_lists_and_yields_to_keys():
    """What a product needs is added; what the owner wrote wins."""
    agent = resolved().agent
    assert agent.command == ("tool", "--quiet")
    assert agent.environment == {"TOOL_HOME": "{home}/.tool", "TOOL_QUIET": "0", "EXTRA": "x"}
    assert agent.egress.allow == ("api.tool.example", "a.example", "login.tool.example")
    assert agent.carry == (".tool/settings", "~/.tool/models.json")
    assert agent.pass_environment == ("TOOL_MODEL",)
    assert agent.workspace.protect == (".tool",)
    assert agent.hardening.netlink is False
    assert agent.egress.mode == "ask"


def test_nothing_is_folded_in_twice():
    """The remaining preset holds no hosts or variables, so that a narrowed agent stays narrow."""
    preset = resolved().preset
    assert (preset.hosts, preset.carry, preset.environment, preset.command, preset.protect) == ((), (), {}, (), ())


def test_a_secret_is_only_carried_when_the_owner_names_it():
    """A secret file stays withheld unless the agent's own `carry` names that very file."""
    assert resolved().preset.secrets == (".tool/auth.json",)


def test_a_profile_replaces_what_it_writes_and_leaves_the_rest():
    """A profile lies over the agent, and may do without the preset's hosts."""
    agent = resolved("narrow").agent
    assert agent.egress.allow == ("b.example",)
    assert agent.egress.mode == "ask"
    assert (agent.limits.memory_max, agent.limits.tasks_max) == ("4G", 9)
    assert resolved("open").agent.workspace.protect == ()


def test_every_rule_knows_where_it_was_written():
    """`explain` can name the line of a rule, or the preset it comes from."""
    plain, narrow = resolved(), resolved("narrow")
    assert plain.source(("egress", "allow", 0)) == "preset tool"
    assert plain.source(("egress", "allow", 1)) == "p.toml:8 .agents.coder.egress.allow[0]"
    assert plain.source(("limits", "memory_max")) == "p.toml:10 .agents.coder.limits.memory_max"
    assert narrow.source(("egress", "allow", 0)) == "p.toml:12 .profiles.narrow.egress.allow[0]"
    assert narrow.source(("egress", "mode")) == "p.toml:7 .agents.coder.egress.mode"
    assert plain.source(("llm", "models")) == ""


@pytest.mark.parametrize(
    ("agent", "profile", "reference"), [("nobody", "", "agent-unknown"), ("coder", "none", "profile-unknown")]
)
def test_unknown_names_are_refused_with_the_known_ones(agent, profile, reference):
    """A typing mistake on the command line is answered with what exists."""
    with pytest.raises(PolicyError) as caught:
        resolve(read(POLICY, "p.toml"), agent, profile, presets={"tool": PRESET})
    assert caught.value.reference == reference
    assert caught.value.remedy.startswith("one of ")


def test_a_broken_file_is_never_resolved():
    """One mistake anywhere in the file refuses the whole file."""
    with pytest.raises(PolicyError):
        resolve(read(POLICY + "[agents.other]\nx = 1\n", "p.toml"), "coder", presets={"tool": PRESET})
