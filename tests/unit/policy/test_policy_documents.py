"""What people copy from README.md and docs/ works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.llm.prices import parse_prices
from cloister.policy.document import read
from cloister.policy.load import load
from cloister.policy.merge import resolve
from cloister.policy.presets import BUILTIN, builtin_presets
from cloister.runs.credentials_warnings import warnings
from cloister.runs.signing_review import unreachable
from cloister.runs.unenforced import refuse_unenforced

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "docs/credentials.md", "docs/models.md", "docs/services.md", "docs/units.md")
BLOCKS = [
    (page, text)
    for page in PAGES
    for text in re.findall(r"^```toml\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
]
POLICIES = [(page, text) for page, text in BLOCKS if "[[price]]" not in text]
EXAMPLES = sorted((ROOT / "examples/policies").glob("*.toml"))


def whole(text: str) -> str:
    """Return a piece of a policy as a policy: what the page takes as given stands in front."""
    named = re.findall(r"^\[agents\.([a-z]+)\.", text, re.MULTILINE)
    given = [
        f'[agents.{name}]\npreset = "{name}"\n' for name in dict.fromkeys(named) if f"[agents.{name}]\n" not in text
    ]
    return ("" if text.startswith("schema = 1") else "schema = 1\n") + "".join(given) + text


def complaints(text: str) -> list[str]:
    """Return what `cloister check` would warn of; mistakes raise."""
    policy = load(text.encode(), "cloister.toml", preset_names=BUILTIN)
    found = []
    for name in policy.agents:
        agent = resolve(read(text.encode(), "cloister.toml"), name, presets=builtin_presets()).agent
        rules, guard = compile_ruleset(agent.egress, agent=name), compile_guard(agent.egress, agent=name)
        found += [warned.message for warned in warnings(agent, name, "/home/ann", (rules, guard))]
        found += [f"{missing.place} is not allowed" for missing in unreachable(agent, rules, guard)]
    return found


@pytest.mark.parametrize(("page", "text"), POLICIES, ids=[f"{page}-{n}" for n, (page, _) in enumerate(POLICIES)])
def test_every_example_of_the_pages_is_a_policy_without_a_warning(page: str, text: str) -> None:
    """A reader who copies a block gets what the page says: it loads, and `check` has nothing to add."""
    assert not complaints(whole(text)), page


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_file_is_without_a_warning(path: Path) -> None:
    """No credential of examples/ goes nowhere or to a host that is not allowed."""
    if path.name != "project.cloister.toml":
        assert not complaints(path.read_text("utf-8"))


def test_an_example_that_forgets_its_host_would_be_found() -> None:
    """The tests above can fail: without the rule, the first example of credentials.md is complained of."""
    text = next(text for page, text in POLICIES if page == "docs/credentials.md")

    assert complaints(whole(text.replace('"api.github.com", ', "", 1)))


def test_the_examples_of_prices_are_price_files() -> None:
    """The own prices that models.md shows are read."""
    files = [text for _, text in BLOCKS if "[[price]]" in text]

    assert files
    assert all(parse_prices(text, "prices.toml") for text in files)


def test_the_recommended_policy_can_be_run() -> None:
    """README's policy asks for nothing that this version refuses, and carries no key in."""
    text = next(text for page, text in POLICIES if page == "README.md")
    agent = resolve(read(text.encode(), "cloister.toml"), "claude", presets=builtin_presets()).agent

    refuse_unenforced(agent)
    assert not {"ANTHROPIC_API_KEY", "GH_TOKEN"} & set(agent.pass_environment)
    assert agent.llm.providers
