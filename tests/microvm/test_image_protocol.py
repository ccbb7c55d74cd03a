"""An image whose first process speaks another version of the channel starts nothing, and it is said what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.host.vm_link import PROTOCOL
from cloister.images.trust import key_line
from support.cloister import User
from support.made_image import Signer, make

POLICY = """\
schema = 1
[agents.shell]
preset = "shell"
isolation = "microvm"
environment_audit = false
[agents.shell.microvm]
image = "made"
warm = false
"""


@pytest.fixture
def user(home: Path) -> User:
    """A user whose images are signed by a key that is trusted."""
    return User(home, POLICY)


def put(user: User, protocol: int) -> None:
    """Make an image of this version of the channel; it is whole, signed and trusted, and would boot nothing."""
    signer = Signer()
    store = user.home / ".local/share/cloister/images"
    store.mkdir(parents=True, mode=0o700)
    make(store, (signer,), protocol=protocol)
    trusted = user.home / ".config/cloister/trust.d"
    trusted.mkdir(parents=True, mode=0o700)
    (trusted / "test.pub").write_text(key_line(signer.public))
    (trusted / "test.pub").chmod(0o600)


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 2**31])
def test_an_image_of_another_version_is_refused(user: User, workspace: Path, protocol: int) -> None:
    """`run` and `plan` refuse it before anything is made, and name the remedy."""
    put(user, protocol)
    ran = user.run("run", "--no-pty", "shell", "--", "true", cwd=workspace)
    planned = user.run("plan", "shell", cwd=workspace)
    user.close()

    assert ran.returncode == 125, ran.stderr
    assert planned.returncode not in (0, 70), planned.stderr
    for said in (ran.stderr, planned.stderr):
        assert "image-protocol" in said
        assert f"speaks version {protocol} of the channel" in said
        assert "cloister image renew made" in said
    assert not list(user.state.glob("runs/*/plan.json"))


def test_one_of_this_version_is_planned(user: User, workspace: Path) -> None:
    """The same image with the version that this Cloister speaks passes, up to its kernel, which is none."""
    put(user, PROTOCOL)
    planned = user.run("plan", "shell", cwd=workspace)
    user.close()

    assert planned.returncode == 0, planned.stderr
    assert "made" in planned.stdout
