"""What a person sees when a policy is wrong: each bad policy beside the exact text of its refusal.

Run with CLOISTER_UPDATE_GOLDEN=1 to write the texts anew; read the difference before it is committed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.errors import PolicyError, render
from cloister.policy.load import load
from cloister.policy.presets import BUILTIN

HERE = Path(__file__).parent / "policies"
BAD = sorted(path for path in HERE.iterdir() if path.suffix in {".toml", ".json"})


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.name)
def test_a_bad_policy_is_explained(path):
    """Every mistake is shown with its line, what is wrong and what to type; the text is read in review."""
    with pytest.raises(PolicyError) as caught:
        load(path.read_bytes(), path.name, preset_names=BUILTIN)
    shown = render(caught.value) + "\n"
    expected = path.with_suffix(".error")
    if os.environ.get("CLOISTER_UPDATE_GOLDEN"):
        expected.write_text(shown, encoding="utf-8")
    assert shown == expected.read_text(encoding="utf-8")


def test_every_text_belongs_to_a_policy():
    """No expected text is left behind by a policy that went."""
    assert {path.with_suffix(".error") for path in BAD} == set(HERE.glob("*.error"))
