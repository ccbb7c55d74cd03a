"""The recipes that come with Cloister, built as shipped, each booted: the programs that it promises run in there.

An image takes minutes to build, so this is for `make test-all`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.runs.images import find_recipe, shipped_recipes
from microvm.conftest import GuestImage
from support.cloister import BASE, User

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
ASK_S = 600
PROGRAMS = {
    "minimal": ("bash --version", "ls --version"),
    "dev": ("git --version", "python3 --version", "node --version", "npm --version", "rg --version", "jq --version"),
    "pi": ("pi --version", "git --version", "python3 --version"),
    "claude": ("claude --version", "rg --version"),
    "codex": ("codex --version", "git --version"),
    "openclaw": ("openclaw --version", "node --version"),
}
"""By image: what is asked for in it. Each must print a version."""
AGENTS = {"pi": "0.86.1", "claude": "2.1.329", "codex": "0.169.0", "openclaw": "2026.9.6"}


def test_no_recipe_is_left_out() -> None:
    """A recipe that ships is booted by a test of this folder."""
    assert set(PROGRAMS) == set(shipped_recipes())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_shipped_recipe_is_an_image_that_boots(
    name: str, shipped: Callable[[str], GuestImage], home: Path, workspace: Path
) -> None:
    """Built by its name and started by a policy that names it; its programs say their versions."""
    image = shipped(name)
    table = f'[agents.shell.microvm]\nimage = "{name}"\nwarm = false\n'
    user = User(home, f'{BASE}isolation = "microvm"\ncommand = ["/bin/sh"]\n{table}')
    image.install(home)
    script = "\n".join(f"echo '# {line}'; {line} | head -n 1 || exit" for line in PROGRAMS[name])
    done = user.inside(script, cwd=workspace, timeout_s=ASK_S)
    user.close()

    said = dict(part.partition("\n")[::2] for part in done.stdout.split("# ")[1:])
    assert done.returncode == 0, done.stderr
    assert set(said) == set(PROGRAMS[name]), done.stdout + done.stderr
    assert not [line for line, text in said.items() if not any(char.isdigit() for char in text)], done.stdout
    if name in AGENTS:
        assert AGENTS[name] in done.stdout
    assert user.receipts()[-1]["host"]["image"] == f"{name} {image.manifest.version}"
    assert find_recipe(name).recipe.digest() == image.manifest.recipe
