"""What is installed for a gateway, beside the files as they were read in review.

`PYTHONPATH=src:tests python tests/golden/test_services.py` writes them anew (tests themselves write nothing).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.gateways import files, rendered

HERE = Path(__file__).parent / "services"
GOLDEN = (
    "openclaw.json",
    "mount-points.conf",
    "documents/TOOLS.md",
    "skills/greet/SKILL.md",
    "cloister-service-home-a.service",
    "cloister-places-home-a.service",
    "cloister-end-home-a.service",
    "cloister-port-home-a.socket",
    "cloister-port-home-a.service",
)


def texts() -> dict[str, str]:
    """Return the texts by the names of their golden files; the filter of system calls has golden digests of its own."""
    made = files(rendered()["home-a"])
    return {
        name.replace("/", "."): re.sub(r"(root root - )[A-Za-z0-9+/=]{100,}", r"\1FILTER", made[name].text)
        for name in GOLDEN
    }


@pytest.mark.parametrize("name", [name.replace("/", ".") for name in GOLDEN])
def test_a_gateway_is_installed_as_it_was_reviewed(name):
    """Units, configuration, mount points and documents of a gateway change only when somebody looks at the change."""
    assert texts()[name] == (HERE / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, text in texts().items():
        (HERE / name).write_text(text, encoding="utf-8")
