"""What is derived from the model: the schema, the manual page, the starter and the examples."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cloister.policy import manual, schema
from cloister.policy.document import read
from cloister.policy.load import load, load_project
from cloister.policy.merge import resolve
from cloister.policy.model import Policy, Preset, Project
from cloister.policy.presets import BUILTIN, builtin_presets
from cloister.policy.starter import starter

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples/policies").glob("*.toml"))


def test_every_key_is_documented():
    """A key without manual text cannot be added."""
    for table in schema.tables():
        assert table.text, table.header
        for key in table.keys:
            assert key.text, f"{table.header} {key.name}"


def test_every_table_of_the_model_is_in_the_manual():
    """A table that the file can hold is shown, and shown once."""
    names = {kind.__name__ for kind in schema.TABLES}
    assert names == set(schema.docstrings())
    assert len(schema.TABLES) == len(names)


@pytest.mark.parametrize("kind", [Policy, Project, Preset])
def test_the_json_schema_carries_the_manual(kind):
    """Editors show the same text as the manual, and unknown keys are mistakes there too."""
    made = schema.json_schema(kind)
    assert made["$ref"] == f"#/$defs/{kind.__name__}"
    definition = made["$defs"][kind.__name__]
    assert definition["additionalProperties"] is False
    assert all("description" in shape for shape in definition["properties"].values())


def test_the_json_schema_agrees_with_the_loader():
    """What loads is valid by the schema, and what the loader calls a mistake of form is not."""
    jsonschema = pytest.importorskip("jsonschema")
    made = schema.json_schema()
    for path in EXAMPLES:
        if path.name != "project.cloister.toml":
            jsonschema.validate(read(path.read_bytes(), path.name).tables, made)
    for wrong in ({"schema": 1, "agent": {}}, {"agents": {}}, {"schema": 1, "agents": {"a": {"isolation": "x"}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, made)


def test_the_committed_page_is_current():
    """docs/man/cloister.toml.5 is what the model makes: python -m cloister.policy.manual."""
    assert (ROOT / "docs/man/cloister.toml.5").read_text(encoding="utf-8") == manual.page()


def test_the_page_has_every_key_and_no_stray_requests():
    """Each key has its paragraph, and no line of text is taken for a roff request."""
    page = manual.page()
    for table in schema.tables():
        for key in table.keys:
            assert f".BR {key.name} " in page
    known = {".TH", ".SH", ".SS", ".TP", ".PP", ".BR", ".B", ".I", ".IR", ".nf", ".fi", ".in", ".EX", ".EE", '.\\"'}
    assert {line.split()[0] for line in page.splitlines() if line.startswith((".", "'"))} <= known


def test_the_examples_of_the_page_load():
    """What people copy from the manual works."""
    policy, project = manual.examples()
    assert load(policy, "cloister.toml", preset_names=BUILTIN).agents["claude"].egress.mode == "ask"
    assert load_project(project, ".cloister.toml")[0].every_agent.egress.mode == "deny"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_and_resolves(path):
    """What people copy from examples/ works, for every agent and profile in it."""
    if path.name == "project.cloister.toml":
        load_project(path.read_bytes(), path.name)
        return
    document = read(path.read_bytes(), path.name)
    policy = load(path.read_bytes(), path.name, preset_names=BUILTIN)
    for agent, profile in itertools.product(policy.agents, ["", *policy.profiles]):
        assert resolve(document, agent, profile, presets=builtin_presets()).agent.command


FOUND = [found for size in range(len(BUILTIN) + 1) for found in itertools.combinations(BUILTIN, size)]


@pytest.mark.parametrize("found", FOUND, ids="-".join)
def test_the_starter_always_loads(found):
    """Whatever is installed, the first policy has no mistake and denies by default."""
    for variables in ((), ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "HOME")):
        text = starter(found, builtin_presets(), variables=variables)
        policy = load(text, "cloister.toml", preset_names=BUILTIN)
        assert set(policy.agents) == (set(found) or {"shell"})
        for agent in policy.agents.values():
            assert agent.egress.mode == "deny"
            assert not agent.filesystem.read
            assert set(agent.pass_environment) <= set(variables)


def test_the_starter_keeps_model_keys_outside():
    """A key that the caller has becomes a provider with a file and the command that fills it; no host is allowed."""
    text = starter(
        ["claude", "openclaw"], builtin_presets(), variables=["ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"]
    )
    policy = load(text, "cloister.toml", preset_names=BUILTIN)

    assert "printenv ANTHROPIC_API_KEY > ~/.config/cloister/anthropic.key" in text
    assert policy.providers["anthropic"].key == "file:~/.config/cloister/anthropic.key"
    for agent in policy.agents.values():
        assert agent.llm.providers == ("anthropic",)
        assert not agent.pass_environment
        assert not agent.egress.allow
    assert not policy.agents["claude"].egress.preset_hosts
    assert "*" not in policy.agents["openclaw"].llm.models[0]  # its default has to be one model


def test_the_starter_proposes_models_behind_a_mark_without_a_key():
    """Where no key is set nothing needs one; taking the marks away gives a policy that loads."""
    text = starter(["codex", "pi"], builtin_presets())
    policy = load(text, "cloister.toml", preset_names=BUILTIN)
    marked = ("[providers.", "protocol =", "key =", "[agents.", "providers =")
    lines = [line.removeprefix("# ") if line[2:].startswith(marked) else line for line in text.splitlines()]
    unmarked = load("\n".join(lines), "cloister.toml", preset_names=BUILTIN)

    assert not policy.providers
    assert not any(agent.llm.providers for agent in policy.agents.values())
    assert set(unmarked.providers) == {"anthropic", "openai"}
    assert unmarked.agents["codex"].llm.providers == ("openai",)
    assert "cloister login codex" in text


def test_the_starter_says_what_a_key_in_the_sandbox_means():
    """A key that no provider takes is readable by everything inside, and the text says so where it is let in."""
    text = starter(["pi"], builtin_presets(), variables=["GEMINI_API_KEY"])
    assert 'pass_environment = ["GEMINI_API_KEY"]' in text
    assert "can read this variable" in text
    assert 'allow = ["generativelanguage.googleapis.com"]' in text
