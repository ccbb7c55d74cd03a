"""Loading a policy: every mistake at once, each with its path, its line and something to type."""

from __future__ import annotations

import time

import pytest

from cloister.errors import PolicyError
from cloister.policy.document import MAX_MISTAKES
from cloister.policy.load import load, load_preset, load_project
from cloister.policy.model import EgressRule, Policy

GOOD = """\
schema = 1
[agents.claude]
preset = "claude"
[agents.claude.egress]
allow = ["*.example.org:443", { host = "api.github.com", methods = ["GET"] }]
"""


def problems(text, name="p.toml"):
    """Return where -> (message, remedy) of a policy that must be refused."""
    with pytest.raises(PolicyError) as caught:
        load(text, name)
    return {problem.where: (problem.message, problem.remedy) for problem in caught.value.problems}


def test_a_good_policy_loads():
    """A policy without mistakes becomes values, with defaults that deny."""
    policy = load(GOOD, "p.toml")
    claude = policy.agents["claude"]
    assert claude.egress.allow == ("*.example.org:443", EgressRule(host="api.github.com", methods=("GET",)))
    assert claude.egress.mode == "deny"
    assert claude.filesystem.read == ()


def test_json_and_toml_mean_the_same():
    """Nix writes JSON, people write TOML; there is one model."""
    text = '{"schema": 1, "agents": {"pi": {"preset": "pi", "limits": {"tasks_max": 9}}}}'
    toml = 'schema = 1\n[agents.pi]\npreset = "pi"\nlimits.tasks_max = 9\n'
    assert load(text, "p.json") == load(toml, "p.toml")


def test_all_mistakes_are_reported_at_once():
    """Nobody has to run a check five times to find five mistakes, be they of form or of meaning."""
    found = problems(
        "schema = 1\n"
        "[agents.claude]\n"
        'presett = "claude"\n'
        'isolation = "namespce"\n'
        'memory_max = "4G"\n'
        "[agents.claude.egress]\n"
        'allow = [{ host = "a.b", port = "443" }, { hots = "x" }, "127.1", "*.a.b"]\n'
        "[agents.claude.limits]\n"
        "tasks_max = 0\n"
        "[colour]\n"
    )
    assert found == {
        "p.toml:3 .agents.claude.presett": ("unknown key", "did you mean preset?"),
        "p.toml:4 .agents.claude.isolation": (
            'expected one of namespace, unit, microvm, got "namespce"',
            "did you mean namespace?",
        ),
        "p.toml:5 .agents.claude.memory_max": ("unknown key", "memory_max belongs into the table limits"),
        "p.toml:7 .agents.claude.egress.allow[0].port": (
            'expected a whole number from 1 to 65535, got "443"',
            "443, without quotes",
        ),
        "p.toml:7 .agents.claude.egress.allow[1].hots": ("unknown key", "did you mean host?"),
        "p.toml:7 .agents.claude.egress.allow[1]": ("the key host is missing", ""),
        "p.toml:7 .agents.claude.egress.allow[2]": (
            "some resolvers read this name as an address: write the address with all four numbers",
            "",
        ),
        "p.toml:9 .agents.claude.limits.tasks_max": ("expected a whole number not below 1, got 0", ""),
        "p.toml:10 .colour": (
            "unknown key",
            "known here: agents, audit, images, ledger, microvm, profiles, providers, schema, services, users",
        ),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the key schema is missing"),
        ("schema = 2\nfuture = true\n", "schema 2 is not known"),
        ("schema = true\n", "schema is a number"),
        ('schema = "1"\n', "schema is a number"),
        ("schema = 1.0\n", "schema is a number"),
    ],
)
def test_the_schema_number_comes_first(text, message):
    """A file of another format is refused for that alone: its other keys mean nothing here."""
    found = problems(text)
    assert len(found) == 1
    assert message in next(iter(found.values()))[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("preset = 1", "expected text, got 1"),
        ("preset = 2026-01-01", "expected text, got a date or time"),
        ("command = 'ls'", "expected a list, got text"),
        ("command = [1]", "expected text, got 1"),
        ("environment = ['A']", "expected a table, got a list"),
        ("environment.A = 1", "expected text, got 1"),
        ("sandbox_note = 1", "expected true or false, got 1"),
        ("egress = 1", "expected a table, got a number"),
        ("egress.allow = [1]", "expected text or a table, got 1"),
        ("limits.tasks_max = true", "expected a whole number not below 1, got true"),
        ("llm.cost_per_day_usd = nan", "not a finite number"),
        ("llm.cost_per_day_usd = inf", "not a finite number"),
        ("llm.cost_per_day_usd = -1", "expected a number not below 0, got -1"),
        ('command = ["a\\u0000b"]', "holds a NUL character"),
        ('environment."A\\u0000" = "b"', "holds a NUL character"),
    ],
)
def test_a_wrong_type_says_what_was_expected(line, message):
    """A value of the wrong type is never converted in silence."""
    found = problems(f"schema = 1\n[profiles.a]\n{line}\n")
    assert [found_message for found_message, _ in found.values()] == [message]


def test_half_a_utf16_pair_from_json_is_refused():
    """JSON can spell text that no file name can hold; it is refused here, not in the middle of a launch."""
    found = problems('{"schema": 1, "agents": {"a": {"command": ["\\ud800"]}}}')
    assert "UTF-16" in next(iter(found.values()))[0]


def test_a_secret_in_the_wrong_place_is_not_printed():
    """An error goes to terminals and logs: a key in a wrong key must not travel with it."""
    key = "sk-ant-api03-" + "x" * 30
    with pytest.raises(PolicyError) as caught:
        load(f'schema = 1\n[agents.a]\nisolation = "{key}"\ncommand = "{key}"\n', "p.toml")
    assert key not in repr(caught.value.problems)


def test_hostile_text_is_refused_quickly():
    """A project file comes from a stranger: neither long keys nor thousands of mistakes keep the broker busy."""
    started = time.process_time()
    for text in ("a." * 500_000 + "a = 1", "schema = 1\n" + "".join(f"k{i} = 1\n" for i in range(60_000))):
        with pytest.raises(PolicyError) as caught:
            load(text, "p.toml")
        assert len(caught.value.problems) <= MAX_MISTAKES + 1
    assert caught.value.problems[-1].message.startswith("and more")
    assert time.process_time() - started < 10  # about a second; with tomllib alone the first takes hours


def test_a_whole_number_is_a_number():
    """The twin of the strict types: 20 is a fine amount of dollars, and text stays text."""
    policy = load('schema = 1\n[agents.a]\ncommand = ["x"]\nllm.cost_per_day_usd = 20\n', "p.toml")
    assert policy.agents["a"].llm.cost_per_day_usd == 20


def test_an_empty_policy_is_a_policy():
    """Only the schema is required: nothing is allowed then."""
    assert load("schema = 1\n", "p.toml") == Policy(schema=1)


def test_an_unknown_preset_is_named():
    """A preset that does not exist is a mistake when the caller knows which presets there are."""
    with pytest.raises(PolicyError) as caught:
        load('schema = 1\n[agents.a]\npreset = "claud"\n', "p.toml", preset_names=("claude", "pi"))
    assert caught.value.problems[0].remedy == "one of claude, pi"
    assert load('schema = 1\n[agents.a]\npreset = "mine"\n', "p.toml").agents["a"].preset == "mine"


def test_presets_and_project_files_are_loaded_as_strictly():
    """All three kinds of files go through the same door."""
    with pytest.raises(PolicyError):
        load_preset("schema = 1\nhost = []\n", "preset x")
    with pytest.raises(PolicyError):
        load_project("schema = 1\n[users.a]\n", ".cloister.toml")
    assert load_preset("schema = 1\n", "preset x").hosts == ()
    project, document = load_project('schema = 1\n[every_agent.egress]\ndeny = ["a.b"]\n', ".cloister.toml")
    assert project.every_agent.egress.deny == ("a.b",)
    assert document.tables["every_agent"] == {"egress": {"deny": ["a.b"]}}
