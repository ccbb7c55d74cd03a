"""Keys about settings, files of variables and places of configuration: what may stand there."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.policy.document import read
from cloister.policy.load import load_document
from cloister.policy.merge import resolve
from cloister.policy.model import Preset
from cloister.policy.tighten import tighten

AGENT = 'schema = 1\n[agents.a]\ncommand = ["x"]\n'
USERS = AGENT + '[users.alice]\nagents = ["a"]\nroots = ["~/src"]\n'


@pytest.mark.parametrize(
    "text",
    [
        AGENT + 'settings = { a = 1, b = { c = [1.5, "x", true] } }',
        AGENT + 'environment_files = ["/etc/a.env", "~/b.env"]',
        USERS + 'config = "dotfiles/a"',
        USERS + 'config = { a = "~/dotfiles/a" }',
    ],
)
def test_what_fits_is_taken(text: str) -> None:
    """Any JSON for settings, whole paths for files, one place or one by agent."""
    load_document(read(text.encode(), "cloister.toml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AGENT + 'settings = { key = "sk-' + "a" * 30 + '" }', "looks like a secret"),
        (AGENT + "settings = { when = 2026-01-01 }", "no date"),
        (AGENT + "settings = { n = nan }", "not a finite number"),
        (AGENT + "settings = " + "{ a = " * 40 + "1" + " }" * 40, "deeper than 32"),
        (AGENT + 'environment_files = ["a.env"]', "whole path"),
        (AGENT + 'environment_files = ["/etc/../a.env"]', "no .."),
        (USERS + 'config = "/etc"', "below the home"),
        (USERS + 'config = { b = "x" }', "may not start"),
        (USERS + 'config = { a = "../bob" }', "no .."),
    ],
)
def test_what_does_not_is_named(text: str, said: str) -> None:
    """Secrets, values JSON has not, paths that lead elsewhere."""
    with pytest.raises(PolicyError) as caught:
        load_document(read(text.encode(), "cloister.toml"))
    assert any(said in problem.message for problem in caught.value.problems), caught.value.problems


def test_a_project_adds_neither_settings_nor_files() -> None:
    """`.cloister.toml` may take a file away; settings and new files are the owner's."""
    text = AGENT + 'settings = { a = 1 }\nenvironment_files = ["/etc/a.env"]'
    agent = resolve(read(text.encode(), "x"), "a", presets={"": Preset(schema=1)}).agent
    fewer = read(b"schema = 1\n[every_agent]\nenvironment_files = []\n", ".cloister.toml")
    assert tighten(agent, fewer, ("every_agent",)).environment_files == ()
    for wider in ("settings = { a = 2 }", 'environment_files = ["/etc/b.env"]'):
        with pytest.raises(PolicyError):
            tighten(agent, read(f"schema = 1\n[every_agent]\n{wider}\n".encode(), ".cloister.toml"), ("every_agent",))


def test_a_profile_lays_its_settings_over_the_agents() -> None:
    """Tables merge, as everywhere in a policy."""
    text = AGENT + "settings = { a = 1, t = { x = 1 } }\n[profiles.p]\nsettings = { a = 2, t = { y = 2 } }"
    resolved = resolve(read(text.encode(), "x"), "a", "p", presets={"": Preset(schema=1)})
    assert resolved.agent.settings == {"a": 2, "t": {"x": 1, "y": 2}}
