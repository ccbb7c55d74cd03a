"""The list of allowed skips: what it accepts, and that a skip outside it fails in CI."""

from pathlib import Path

import pytest

from support import skips
from support.skips import AllowedSkip

ROOT = Path(__file__).parents[3]


def test_a_pattern_allows_exactly_the_tests_it_matches() -> None:
    """An entry covers the tests of its pattern, brackets included, and no others."""
    entries = (AllowedSkip("tests/kernel/test_a.py::*", "why"), AllowedSkip("tests/test_b.py::test_x[1]", "why"))

    assert skips.is_allowed("tests/kernel/test_a.py::test_y[2]", entries)
    assert skips.is_allowed("tests/test_b.py::test_x[1]", entries)
    assert not skips.is_allowed("tests/test_b.py::test_x[2]", entries)
    assert not skips.is_allowed("tests/kernel/test_ab.py::test_y", entries)


@pytest.mark.parametrize(
    "text", ['[[skip]]\ntest="x"', '[[skip]]\ntest="x"\nreason=""', '[[skip]]\ntset="x"\nreason="y"']
)
def test_an_entry_needs_a_test_and_a_reason(tmp_path: Path, text: str) -> None:
    """An entry without a reason, or with an unknown key, is an error."""
    (tmp_path / "skips.toml").write_text(text)

    with pytest.raises(ValueError, match=r"skips\.toml"):
        skips.load(tmp_path / "skips.toml")


def test_every_entry_names_a_test_file_that_exists() -> None:
    """The committed list holds no entry for a file that is gone."""
    for entry in skips.load(ROOT / "tests" / "allowed_skips.toml"):
        assert (ROOT / entry.test.partition("::")[0]).exists(), entry
