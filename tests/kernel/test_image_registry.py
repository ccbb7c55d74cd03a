"""Whose registry of npm a build asks: the user's, never that of the directory in which it is typed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.host import image_agents, programs
from cloister.plan.facts import Program

pytestmark = pytest.mark.kernel
OWN, EVIL = "https://own.invalid/npm/", "https://evil.invalid/"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which an agent has left settings and a program; the user stands there."""
    (tmp_path / "home").mkdir()
    (tmp_path / ".npmrc").write_text(f"registry={EVIL}\n")
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho {EVIL}\n")
    npm.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path}:.:{os.environ['PATH']}")
    monkeypatch.delenv("npm_config_registry", raising=False)
    return tmp_path


@pytest.mark.parametrize("npm", [True, False])
def test_nothing_of_where_one_stands_counts(place: Path, monkeypatch: pytest.MonkeyPatch, npm: bool) -> None:
    """Neither its settings nor its programs, where the system has npm and where it has none."""
    if not npm:
        monkeypatch.setattr(image_agents, "find", lambda *_: Program())
    assert image_agents.registry() != EVIL
    assert not (place / "started").exists()
    assert programs.find("npm", os.environ["PATH"]).path != str(place / "npm")


def test_the_users_own_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable, else the settings of the home; what is no address is none."""
    monkeypatch.setattr(image_agents, "find", lambda *_: Program())
    assert not image_agents.registry()
    settings = place / "home/.npmrc"
    settings.write_text(f"fund=false\n registry = {OWN} \n")
    assert image_agents.registry() == OWN
    monkeypatch.setenv("npm_config_registry", "https://other.invalid")
    assert image_agents.registry() == "https://other.invalid"
    monkeypatch.delenv("npm_config_registry")
    settings.write_text("registry = --upgrade\n")
    assert not image_agents.registry()
