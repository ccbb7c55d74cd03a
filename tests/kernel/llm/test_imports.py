"""A run without models pays nothing for them."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernel

LATE = ("cloister.relay.llm", "cloister.llm", "cloister.runs.books", "apsw", "sqlite3", "prometheus_client", "botocore",
        "google", "psycopg")  # fmt: skip


def test_the_broker_starts_without_the_proxy() -> None:
    """Nothing of it is imported before the first run that has models."""
    code = "import sys, cloister.services.broker; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = done.stdout.split("\n")

    assert "cloister.runs.supervise" in loaded
    assert [name for name in loaded if name.startswith(LATE)] == []
