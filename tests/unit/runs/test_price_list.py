"""A user's own prices: read when they change, trusted as policy files are, and never half."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.errors import PolicyError
from cloister.llm.tokens import Usage
from cloister.runs.paths import Paths
from cloister.runs.price_list import PriceFiles

OWN = 'schema = 1\n[[price]]\nmodels = ["claude-opus-5"]\ndate = "2026-11-01"\ninput = {}\noutput = 2\n'
MILLION = Usage(input_tokens=1_000_000)


@pytest.fixture
def files(tmp_path: Path) -> PriceFiles:
    """Prices of a user whose configuration is in a temporary directory."""
    return PriceFiles(Paths(str(tmp_path), str(tmp_path), str(tmp_path), str(tmp_path)), os.getuid())


def _cost(files: PriceFiles) -> float:
    price = files.current().find("anthropic", "claude-opus-5")
    assert price is not None
    return price.cost(MILLION)


def test_an_own_file_is_read_when_it_comes_changes_and_goes(files: PriceFiles, tmp_path: Path) -> None:
    """The next call costs what the file says then; without it, what comes with Cloister holds."""
    path = tmp_path / "prices.toml"
    assert _cost(files) == 5
    path.write_text(OWN.format(7))
    path.chmod(0o600)
    assert _cost(files) == 7
    path.write_text(OWN.format(12.5))
    assert _cost(files) == 12.5
    path.unlink()
    assert _cost(files) == 5


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_file_that_others_can_write_is_refused(files: PriceFiles, tmp_path: Path, mode: int) -> None:
    """Whoever could lower prices could spend more: the rules are those of policy files."""
    path = tmp_path / "prices.toml"
    path.write_text(OWN.format(0))
    path.chmod(mode)
    with pytest.raises(PolicyError) as caught:
        files.current()
    assert caught.value.reference == "policy-untrusted"


def test_a_broken_file_is_an_error_each_time_until_it_is_mended(files: PriceFiles, tmp_path: Path) -> None:
    """Neither the old prices nor those without the file take its place."""
    path = tmp_path / "prices.toml"
    path.write_text(OWN.format(7))
    path.chmod(0o600)
    assert _cost(files) == 7
    path.write_text("schema = 1\n[[price]]\nmodels = 3\n")
    for _ in range(2):
        with pytest.raises(PolicyError):
            files.current()
    path.write_text(OWN.format(8))
    assert _cost(files) == 8
