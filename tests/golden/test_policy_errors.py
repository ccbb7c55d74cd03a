"""What a person sees when a policy is wrong: each bad policy beside the exact text of its refusal.

`PYTHONPATH=src:tests python tests/golden/test_policy_errors.py` writes the texts anew (tests themselves write nothing).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.errors import PolicyError, render
from cloister.policy.load import load
from cloister.policy.presets import BUILTIN

HERE = Path(__file__).parent / "policies"
BAD = sorted(path for path in HERE.iterdir() if path.suffix in {".toml", ".json"})


def explained(path: Path) -> str:
    """Return what a person sees of a bad policy."""
    with pytest.raises(PolicyError) as caught:
        load(path.read_bytes(), path.name, preset_names=BUILTIN)
    return render(caught.value) + "\n"


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.name)
def test_a_bad_policy_is_explained(path):
    """Every mistake is shown with its line, what is wrong and what to type; the text is read in review."""
    assert explained(path) == path.with_suffix(".error").read_text(encoding="utf-8")


def test_every_text_belongs_to_a_policy():
    """No expected text is left behind by a policy that went."""
    assert {path.with_suffix(".error") for path in BAD} == set(HERE.glob("*.error"))


if __name__ == "__main__":
    for bad in BAD:
        bad.with_suffix(".error").write_text(explained(bad), encoding="utf-8")
