"""The next Debian's kernel: Zstandard, modules in xz, virtio built in. Built and booted for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cloister.images.manifest import Manifest
from support import guest_machine
from support.guest_link import GuestLink, fields
from support.guest_machine import GuestMachine, line

RECIPE = 'schema = 1\nname = "next"\nsuite = "trixie"\npackages = ["bash", "coreutils"]\n'


class Made:
    """An image by its directory."""

    def __init__(self, path: Path) -> None:
        """Read its manifest."""
        self.path = path
        self.manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_an_image_of_debian_13_boots(tmp_path: Path) -> None:
    """Its kernel is unpacked, its modules are found and load in order, and a run begins behind the same walls."""
    (tmp_path / "next.toml").write_text(RECIPE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    argv = [sys.executable, "-m", "cloister", "image", "build", str(tmp_path / "next.toml")]
    subprocess.run(argv, check=True, env={**environment, "HOME": str(tmp_path)}, capture_output=True)
    made = guest_machine.of(Made(tmp_path / ".local/share/cloister/images/next/1"))
    with GuestMachine(made, line(made), mac="02:00:00:00:00:07") as machine:
        link = GuestLink(machine.channel)
        assert link.join()["kernel"].startswith("6.12.")
        link.begin(fields(address="10.0.0.7/24", gateway="10.0.0.1"))
        assert link.run("ls", "/sys/class/net").out.split() == ["eth0", "lo"]
        assert link.run("cat", "/proc/sys/kernel/modules_disabled").out == "1\n"
        assert link.run("touch", "/usr/x").status != 0
        assert link.finish() == 0
