"""Fixtures of the tests in the virtual machine: a user."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cloister import User


@pytest.fixture
def user(home: Path) -> Iterator[User]:
    """A user with a policy for one agent, `shell`; the broker is ended afterwards."""
    user = User(home)
    yield user
    user.close()
