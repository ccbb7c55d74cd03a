"""Firecracker's driver against a look-alike of it that boots the tests' real guest: the API, the channel, and whole runs.

There is no KVM here, so no test of this file has met the real one. Where CLOISTER_FIRECRACKER names a Firecracker and KVM
boots guests, the tests at the end use it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.host.firecracker import FirecrackerApi
from cloister.host.firecracker_probe import Guest, try_boot
from cloister.host.vm_link import Channel
from cloister.isolation import firecracker
from cloister.isolation.qemu import command_line
from cloister.plan.vm import VmFile, VmLaunch
from cloister.runs.vm_firecracker import FirecrackerDriver
from microvm.conftest import GuestImage
from support.cloister import User
from support.firecracker_programs import install
from support.firecracker_rig import Rig

REAL = os.environ.get("CLOISTER_FIRECRACKER", "")
POLICY = """\
schema = 1

[agents.shell]
preset = "shell"
isolation = "microvm"
environment_audit = false

[agents.shell.microvm]
image = "test"
memory = "256M"
monitor = "firecracker"
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The look-alike, as `firecracker` in a directory of its own."""
    return install(tmp_path_factory.mktemp("firecracker"))


@pytest.fixture
def user(home: Path, image: GuestImage, program: Path) -> Iterator[User]:
    """A user with the image, and a Firecracker on the PATH."""
    user = User(home, POLICY)
    user.environment["PATH"] += f":{program.parent}"
    image.install(home)
    yield user
    user.close()


def test_a_run(user: User, workspace: Path) -> None:
    """`cloister run` in Firecracker: output, exit code and workspace are those of any run, and the monitor is on record."""
    (workspace / "before").write_text("old\n")
    ended = user.run(
        "run", "shell", "--", "sh", "-c", "cat before; echo new > after; uname -n; exit 7", cwd=workspace, timeout_s=180
    )

    assert (ended.returncode, ended.stdout.splitlines()[:1]) == (7, ["old"]), ended.stderr
    assert (workspace / "after").read_text() == "new\n"
