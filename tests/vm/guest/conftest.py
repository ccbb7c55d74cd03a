"""Fixtures of the tests in the virtual machine: a user, and the image of guests within this guest."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cloister import User
from support.guest_image import CarriedImage

CARRIED = Path("/srv/work/guest-home")
"""Where test_machine.py puts the image."""


@pytest.fixture
def user(home: Path) -> Iterator[User]:
    """A user with a policy for one agent, `shell`; the broker is ended afterwards."""
    user = User(home)
    yield user
    user.close()


@pytest.fixture(scope="session")
def image() -> CarriedImage:
    """The guest image of the tests."""
    return CarriedImage(CARRIED)
