"""Which table `images` counts where there are two policies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.policy.model import Images
from cloister.runs.paths import locate
from cloister.runs.policies import PolicyFiles

ONE, TWO = "ab" * 32, "cd" * 32
AGENT = '[agents.a]\ncommand = ["sh"]\nisolation = "microvm"\n'


def images(folder: Path, user: str, system: str | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Images, Images]:
    """The tables that count: by itself, and with a resolved agent, as a run has it."""
    paths = locate({}, str(folder), os.getuid())
    os.makedirs(paths.config, mode=0o700, exist_ok=True)
    Path(paths.policy).write_text(f"schema = 1\n{AGENT}{user}")
    Path(paths.policy).chmod(0o600)
    place = folder / "system.toml"
    if system is not None:
        place.write_text(f"schema = 1\n{system}")
        place.chmod(0o600)
    # What must be root's is ours here.
    from cloister.runs import policies

    real = policies.read_trusted
    monkeypatch.setattr(policies, "read_trusted", lambda path, uid: real(path, uid or os.getuid()))
    files = PolicyFiles(paths, os.getuid(), system=str(place) if system is not None else "")
    return files.images(), files.resolve("a").policy.images


def test_the_systems_policy_can_insist_on_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's `false` counts alone, or where the system says `false` too; keys of both are trusted."""
    loose = f'[images]\nrequire_signature = false\ntrust = ["{ONE}"]\n'
    for found in images(tmp_path, loose, None, monkeypatch):
        assert found == Images(require_signature=False, trust=(ONE,))
    for system in ("", f'[images]\ntrust = ["{TWO}"]\n', "[images]\nrequire_signature = true\n"):
        for found in images(tmp_path, loose, system, monkeypatch):
            assert found.require_signature
            assert set(found.trust) == ({ONE, TWO} if TWO in system else {ONE})
    for found in images(tmp_path, loose, "[images]\nrequire_signature = false\n", monkeypatch):
        assert not found.require_signature
    for found in images(tmp_path, "", None, monkeypatch):
        assert found.require_signature
