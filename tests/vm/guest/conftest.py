"""Fixtures of the tests in the virtual machine: a user, and a systemd manager that has made its own directories."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cloister import User


@pytest.fixture(scope="session", autouse=True)
def _used_manager() -> None:
    """Have the manager make a scope: from then on it keeps an empty directory, which is no leftover of ours."""
    if os.environ["CLOISTER_TEST_GUEST"] == "scope" and os.getuid():
        subprocess.run(["systemd-run", "--user", "--quiet", "--scope", "true"], check=True)


@pytest.fixture
def user(home: Path) -> Iterator[User]:
    """A user with a policy for one agent, `shell`; the broker is ended afterwards."""
    user = User(home)
    yield user
    user.close()
