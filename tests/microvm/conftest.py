"""Fixtures of the tests of microVMs: one guest image for all of them, with the program under test as its PID 1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.guest_image import GuestImage, renewed

IMAGE = os.environ.get("CLOISTER_TEST_GUEST", "")
"""The folder that tools/guest-image printed."""


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
