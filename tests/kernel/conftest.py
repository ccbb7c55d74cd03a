"""Fixtures of the kernel tests: a user with the installed `cloister`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bound import HOST
from support.cloister import User
from support.fake_oauth import FakeOauth
from support.secure_server import SecureServer, TestAuthority


@pytest.fixture
def user(home: Path) -> Iterator[User]:
    """A user with a policy for one agent, `shell`; the broker is ended afterwards."""
    user = User(home)
    yield user
    user.close()


@pytest.fixture
def authority(tmp_path: Path, user: User) -> TestAuthority:
    """An authority that the user's broker trusts, and nothing besides."""
    made = TestAuthority(tmp_path / "pki")
    user.environment["SSL_CERT_FILE"] = str(made.file)
    return made


@pytest.fixture
def server(authority: TestAuthority) -> Iterator[SecureServer]:
    """A web server to which the bound host's name leads."""
    with SecureServer(authority.context(HOST)) as one:
        yield one


@pytest.fixture
def provider() -> Iterator[FakeOauth]:
    """A provider whose access tokens last an hour."""
    with FakeOauth() as provider:
        yield provider
