"""Coverage-guided fuzzing of the parsers that read what an agent sends, for a bounded time each (`make test-all`)."""

import subprocess
import sys
from pathlib import Path

import pytest

HARNESSES = sorted((Path(__file__).parent.parent / "fuzz").glob("atheris_*.py"))
SECONDS = 30


@pytest.mark.slow
@pytest.mark.parametrize("harness", HARNESSES, ids=lambda path: path.stem)
def test_no_input_breaks_the_parser(harness: Path, tmp_path: Path) -> None:
    """Half a minute of coverage-guided inputs finds no crash, no hang and no broken promise."""
    # By a shell that forks: libFuzzer bounds ru_maxrss, which a child by vfork(2) has from its parent.
    shell = ["sh", "-c", '"$@"; exit "$?"', "sh"]
    done = subprocess.run(
        [*shell, sys.executable, str(harness), f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"],
        cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS * 4, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done " in done.stderr
