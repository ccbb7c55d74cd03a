"""No text crashes the policy: it is a policy, or it is refused with a PolicyError."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import PolicyError, render
from cloister.policy import model
from cloister.policy.document import read
from cloister.policy.hosts import parse_rule
from cloister.policy.load import load, load_preset, load_project
from cloister.policy.merge import resolve
from cloister.policy.presets import builtin_presets

VALID = """\
schema = 1
[providers.anthropic]
key = "file:~/.config/cloister/anthropic.key"
[agents.claude]
preset = "claude"
environment = { A = "1" }
[agents.claude.egress]
allow = ["*.example.org:443", { host = "api.github.com", methods = ["GET"] }]
[agents.claude.limits]
memory_max = "4G"
[users.ann]
agents = ["claude"]
roots = ["~/p"]
"""

KEYS = sorted({info.name for kind in vars(model).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
               for info in msgspec.structs.fields(kind)})  # fmt: skip

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["claude", "a.example:443", "4G", "8h", "~/src", "/", "namespace", "ask", "file:/k"])
)  # fmt: skip
tables = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)  # fmt: skip


def outcome(load_one, text, name):
    """Load, or return the refusal, which must be one that can be shown."""
    try:
        return load_one(text, name)
    except PolicyError as error:
        refusal = error
    assert refusal.problems
    assert all(problem.message for problem in refusal.problems)
    assert all(line.isprintable() for line in render(refusal).split("\n"))
    return None


@given(st.text(max_size=400) | st.binary(max_size=400))
def test_any_text_is_a_policy_or_refused(text):
    """Arbitrary characters and bytes never crash the loader."""
    outcome(load, text, "p.toml")
    outcome(load, text, "p.json")


@given(st.text(alphabet="[]{}=.\"'#, \nab1_-\\:", max_size=120))
def test_text_of_toml_signs_never_crashes_the_scanner(text):
    """The scanner that looks up lines is only comfort: it never fails, hangs or moves a value."""
    outcome(read, text, "p.toml")


@given(tables)
def test_any_json_is_a_policy_or_refused(value):
    """Tables of any shape, with real keys in wrong places, are a policy or are refused."""
    document = {"schema": 1, "agents": {"a": value}, "profiles": value}
    outcome(load, json.dumps(document), "p.json")
    outcome(load, json.dumps({"schema": 1} | (value if isinstance(value, dict) else {})), "p.json")


@given(tables)
def test_any_preset_and_project_is_read_or_refused(value):
    """The other two kinds of files are as robust."""
    fields = value if isinstance(value, dict) else {}
    outcome(load_preset, json.dumps({"schema": 1} | fields), "preset x.json")
    outcome(load_project, json.dumps({"schema": 1, "every_agent": fields}), "x.json")


@given(st.integers(0, len(VALID)), st.integers(0, 8), st.text(max_size=6))
def test_a_damaged_policy_never_crashes(start, length, patch):
    """Cut and overwritten at any place, a good policy is good or refused, and resolves when it is good."""
    text = VALID[:start] + patch + VALID[start + length :]
    if outcome(load, text, "p.toml") is not None:
        document = read(text, "p.toml")
        for name in document.tables.get("agents", {}):
            outcome(lambda _, __, name=name: resolve(document, name, presets=builtin_presets()), text, "p.toml")


@settings(max_examples=300)
@given(st.text(alphabet="ab.*:[]/%@0x1279-_ \0A\u0131", max_size=20) | st.text(max_size=20))
def test_any_host_is_a_rule_or_a_sentence(text):
    """A rule parses or is refused with words, and what was parsed is parsed again to the same rule."""
    try:
        rule = parse_rule(text)
    except ValueError as error:
        assert str(error)  # noqa: PT017  both outcomes are fine, a crash is not
    else:
        assert parse_rule(rule.text()) == rule
        assert rule.covers(rule)
