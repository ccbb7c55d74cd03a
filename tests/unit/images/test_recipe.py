"""Recipes: what is shipped can be read, and every mistake is shown at once."""

from __future__ import annotations

import json

import pytest

from cloister.errors import PolicyError
from cloister.images.recipe import load
from cloister.runs.images import find_recipe, shipped_recipes

GOOD = 'schema = 1\nname = "mine"\n'


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_recipes(name: str) -> None:
    """Each has its own name and a description, and pins what is not Debian's."""
    found = find_recipe(name)
    assert found.recipe.name == name
    assert found.recipe.description
    if found.recipe.npm:
        locked = json.loads(found.npm_lock)["packages"]
        for word in found.recipe.npm:
            package, version = word.rsplit("@", 1)
            assert locked[f"node_modules/{package}"]["version"] == version
        assert all("integrity" in entry or entry.get("inBundle") for path, entry in locked.items() if path)
        assert "resolved" not in found.npm_lock  # whose registry it was is nobody's business


def test_there_is_one_for_each_preset_and_two_plain_ones() -> None:
    """minimal, dev, and one per agent product that Cloister knows."""
    assert set(shipped_recipes()) == {"minimal", "dev", "claude", "pi", "codex", "openclaw"}


def test_agents_are_those_that_the_tests_run(request: pytest.FixtureRequest) -> None:
    """The versions in recipes are the ones in tests/agents: an agent that was never tested is in no image."""
    tested = json.loads((request.config.rootpath / "tests/agents/package.json").read_text())["dependencies"]
    pinned = dict(
        word.rsplit("@", 1) for name in ("claude", "pi", "codex", "openclaw") for word in find_recipe(name).recipe.npm
    )
    assert pinned == tested


def test_all_mistakes_are_shown_at_once() -> None:
    """Unknown key, bad package, missing version, missing Node, bad path: each with its line and something to write."""
    text = (
        'schema = 1\nname = "Mine"\nsuit = "bookworm"\npackages = ["git", "Bad Package", "a b"]\nnpm = ["left-pad"]\n'
        'pip = ["requests>=2"]\nkernel = "vmlinuz"\n[[files]]\npath = "/etc/passwd"\ncontent = ""\n'
        '[[files]]\npath = "/usr/../etc/x"\ncontent = ""\n[[files]]\npath = "/home/x"\ncontent = ""\n'
    )
    with pytest.raises(PolicyError) as caught:
        load(text, "mine.toml")
    problems = {problem.where: f"{problem.message} {problem.remedy}" for problem in caught.value.problems}
    assert caught.value.reference == "recipe-invalid"
    assert "did you mean suite?" in problems["mine.toml:3 .suit"]
    wheres = " ".join(problems)
    for key in (
        "name",
        "packages[1]",
        "packages[2]",
        "npm[0]",
        "pip[0]",
        "npm",
        "kernel",
        "files[0]",
        "files[1]",
        "files[2]",
    ):
        assert f".{key}" in wheres
    assert all(where.startswith("mine.toml:") for where in problems)


@pytest.mark.parametrize(
    "line",
    [
        'packages = ["--option"]', 'packages = ["git,curl"]', 'packages = ["git/bookworm"]', 'packages = ["./x.deb"]',
        'packages = ["git", "-y"]', 'npm = ["git+https://example.org/x@1.2.3"]\nnode = "24.1.0"', 'node = "latest"',
        'npm = ["x@latest"]\nnode = "24.1.0"', 'pip = ["x @ https://example.org/x"]\npackages = ["python3-venv"]',
        'pip = ["--index-url==1"]\npackages = ["python3-venv"]', 'suite = "sid"', "epoch = -1",
        'npm = ["x@1.2.3"]\nnode = "24.1.0"\nnpm_lock = "../x.json"',
    ],
)  # fmt: skip
def test_words_that_mean_more_than_a_name_are_refused(line: str) -> None:
    """No options, addresses, paths or lists for a name: they end up on command lines of apt, npm and pip."""
    load(GOOD, "mine.toml")
    with pytest.raises(PolicyError):
        load(GOOD + line + "\n", "mine.toml")


def test_the_digest_is_that_of_the_meaning() -> None:
    """Comments and order change nothing; a package does, and so do salt and UUID."""
    one = load('schema = 1\nname = "mine"\npackages = ["git"]\n', "a")
    two = load('# mine\nschema = 1\npackages = ["git"]\nname = "mine"\n', "b")
    other = load('schema = 1\nname = "mine"\npackages = ["git", "jq"]\n', "a")
    assert one.digest() == two.digest() != other.digest()
    assert one.derived("salt") == two.derived("salt") != one.derived("uuid")
    assert one.derived("salt") != other.derived("salt")
