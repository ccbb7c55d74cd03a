"""Fixtures of the tests of microVMs: one guest image for all of them, with the program under test as its PID 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cloister.images.manifest import Manifest
from support.guest_image import GuestImage, renewed

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


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    """The small guest: coreutils, bash, git, procps, Python. Built once per content; PID 1 is the one under test."""
    if not IMAGE:
        pytest.skip("CLOISTER_TEST_GUEST is not set: CLOISTER_TEST_GUEST=$(tools/guest-image)")
    return renewed(IMAGE, tmp_path_factory.mktemp("guest"))


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
