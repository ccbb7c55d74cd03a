"""The doctor boots a guest of an image that a run could use, by the accelerator that really works."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.runs.doctor_vm import vm_findings
from cloister.runs.paths import locate


def found(home: Path, *, quick: bool = False) -> dict[str, tuple[str, str]]:
    """Return state and meaning of each finding, for a user with this home."""
    paths = locate({"XDG_RUNTIME_DIR": str(home / "run")}, str(home), 0)
    environment = {"PATH": "/usr/bin:/usr/sbin"}
    return {each.name: (each.state, each.meaning) for each in vm_findings(paths, environment, quick=quick)}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the home of a user without images."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "run").mkdir(mode=0o700)
    return home


def test_the_doctor_measures_a_boot(image, home: Path) -> None:
    """With an image that is trusted the guest is booted, and the time said; how it is accelerated, and why so."""
    image.install(home)
    state, meaning = found(home)["microvm-boot"]
    assert "a guest came up in" in meaning
    assert state == "ok" if "KVM" in meaning else "emulated: " in meaning


def test_the_doctor_boots_nothing_unasked(image, home: Path) -> None:
    """Asked to be quick, or without an image that may be used, it boots nothing and says so."""
    assert found(home)["microvm-boot"][1].startswith("nobody tried: there is no image")
    image.install(home)
    assert found(home, quick=True)["microvm-boot"] == ("degraded", "nobody tried")
    for key in (home / ".config/cloister/trust.d").iterdir():
        key.unlink()
    assert found(home)["microvm-boot"][1].startswith("nobody tried: there is no image")
