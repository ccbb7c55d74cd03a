"""The manual page of the policy file is good roff."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/man/cloister.toml.5"


@pytest.mark.style
@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_policy_page_builds_without_warnings():
    """The formatter has nothing to say about the page, with every warning on; it renders its last section."""
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", str(PAGE)],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "EXAMPLES" in done.stdout
