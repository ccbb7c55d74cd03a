"""Fixtures of the tests of microVMs: one guest image for all of them, with the program under test as its PID 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from cloister.images.manifest import Manifest
from cloister.policy.model import Images
from cloister.runs.images import Builder, ImagePlaces

IMAGE = os.environ.get("CLOISTER_TEST_GUEST", "")
"""The folder that tools/guest-image printed."""
SHIPPED = os.environ.get("CLOISTER_TEST_SHIPPED", "")
"""A home in which images of shipped recipes are kept, for whoever works on what runs in them: there they are renewed,
not built. Else each is built once for all tests, which takes minutes."""
_BUILD_S = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder boot guests, or could."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.microvm)


class GuestImage(NamedTuple):
    """The image of the tests, as a store that a test can use or copy from."""

    name: str
    path: Path
    """Directory of the version: vmlinux, initramfs.cpio, root.img, manifest.json, manifest.sig."""
    store: Path
    """What would be `images` in a data directory."""
    trust: Path
    """A trust.d with the key that it is signed with."""
    manifest: Manifest

    def install(self, home: Path) -> None:
        """Put it into the store of a user with this home and no XDG variables, and let the user trust its key."""
        version = home / ".local/share/cloister/images" / self.name / str(self.manifest.version)
        version.mkdir(parents=True, mode=0o700)
        for file in self.path.iterdir():
            try:
                (version / file.name).hardlink_to(file)
            except OSError:  # another file system
                (version / file.name).write_bytes(file.read_bytes())
        trusted = home / ".config/cloister/trust.d"
        trusted.mkdir(parents=True, mode=0o700, exist_ok=True)
        for each in self.trust.iterdir():
            target = trusted / each.name
            target.write_bytes(each.read_bytes())
            target.chmod(0o600)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    """The small guest: coreutils, bash, git, procps, Python. Built once per content; PID 1 is the one under test."""
    if not IMAGE:
        pytest.skip("CLOISTER_TEST_GUEST is not set: CLOISTER_TEST_GUEST=$(tools/guest-image)")
    home = tmp_path_factory.mktemp("guest")
    where = ImagePlaces(
        store=str(home / "images"), key=str(home / "key/image-key.pem"), trust=str(home / "trust.d"),
        seen=str(home / "seen.json"), system_store=f"{IMAGE}/store", system_trust=str(home / "none"),
    )  # fmt: skip
    trusted = home / "trust.d"
    trusted.mkdir(mode=0o700)
    for each in Path(IMAGE, "trust.d").iterdir():
        (trusted / each.name).write_bytes(each.read_bytes())
        (trusted / each.name).chmod(0o600)
    built = Builder(where, lambda _: None).renew("test", Images(), os.getuid())
    (trusted / "renewed.pub").write_bytes(Path(f"{where.key}.pub").read_bytes())
    (trusted / "test.pub").unlink()
    return GuestImage("test", Path(built.path), Path(where.store), trusted, built.manifest)


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GuestImage]:
    """Build the image of a recipe that comes with Cloister, as anybody does; once for all tests."""
    home = Path(SHIPPED or tmp_path_factory.mktemp("shipped"))
    built: dict[str, GuestImage] = {}

    def image_of(name: str) -> GuestImage:
        if name not in built:
            built[name] = _built(home, name)
        return built[name]

    return image_of


def _built(home: Path, name: str) -> GuestImage:
    store, trust = home / ".local/share/cloister/images", home / "trust.d"
    verb = "renew" if (store / name).exists() else "build"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-m", "cloister", "image", verb, name, "--json"], env={**environment, "HOME": str(home)},
        capture_output=True, text=True, timeout=_BUILD_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = Path(msgspec.json.decode(done.stdout)["path"])
    trust.mkdir(mode=0o700, exist_ok=True)
    key = home / ".config/cloister/image-key/image-key.pem.pub"
    (trust / "shipped.pub").write_bytes(key.read_bytes())
    manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    return GuestImage(name, path, store, trust, manifest)
