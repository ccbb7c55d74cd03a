"""What the escape tests share: one battery per session, as the user whose machine this is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import leftovers
from support.cloister import User
from support.homes import make_home, make_workspace


@pytest.fixture(scope="session")
def prover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user with a home, a project and the plainest policy, limits included."""
    home = make_home(tmp_path_factory.mktemp("prove") / "home")
    make_workspace(home / "src" / "project")
    user = User(home, POLICY)
    yield user
    user.close()


POLICY = """\
schema = 1

[agents.shell]
preset = "shell"
environment_audit = false

[agents.limited]
preset = "shell"
environment_audit = false

[agents.limited.limits]
memory_max = "512M"
tasks_max = 64
disk_max = "16M"

[agents.learning]
preset = "shell"
environment_audit = false

[agents.learning.egress]
mode = "learn"

[agents.nested]
preset = "shell"
environment_audit = false

[agents.nested.hardening]
nested = true

[agents.impossible]
preset = "shell"
environment_audit = false
command = ["true"]

[agents.impossible.microvm]
image = "none"
"""


@pytest.fixture(scope="session")
def battery(prover: User) -> dict[str, dict[str, Any]]:
    """Run the whole battery once; return what came of each case, by id."""
    before = leftovers.take()
    done = prover.run("prove", "shell", "--json", cwd=prover.home / "src/project", timeout_s=110)
    assert done.returncode in (0, 1, 69), done.stderr
    cases = {case["id"]: case for case in json.loads(done.stdout)["cases"]}
    leftovers.check(before)
    return cases


@pytest.fixture
def ground_base(tmp_path: Path) -> Path:
    """Return a directory in which a weak sandbox keeps its things."""
    base = tmp_path / "weak"
    base.mkdir()
    return base
