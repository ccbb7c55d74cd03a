"""Case files are read as text, and a wrong header is refused."""

import re
from pathlib import Path

import pytest

from cloister.prove.case import load, parse

HEADER = 'ID = "x"\nTITLE = "t"\nPROMISE = "P-001"\nCLASSES = (1, 2)\nEXPECT = "e"\n'
ATTACK = "def attack(box):\n    pass\n"


def test_a_header_becomes_a_case() -> None:
    """Constants become fields; the text stays, to be sent into the sandbox."""
    case = parse(HEADER + 'NEEDS = ("sibling",)\nFRESH = True\n' + ATTACK, "x.py")

    assert (case.id, case.classes, case.needs, case.alone) == ("x", (1, 2), ("sibling",), True)
    assert "def attack" in case.source


@pytest.mark.parametrize(
    "text", [ATTACK, HEADER, HEADER.replace("(1, 2)", '"1"') + ATTACK, HEADER + 'STAGES = ("plant",)\n' + ATTACK]
)
def test_a_wrong_header_is_refused(text: str) -> None:
    """A missing or wrong constant, or a stage without its function, is a ValueError that names the file."""
    with pytest.raises(ValueError, match=r"x\.py"):
        parse(text, "x.py")


def test_reading_a_case_runs_nothing() -> None:
    """A file's own code is never executed on the host."""
    parse(HEADER + "raise SystemExit(1)\n" + ATTACK, "x.py")


def test_every_case_names_a_promise_that_exists() -> None:
    """Ids are file names, promises stand in SPECIFICATION.md with the same words, expectations are not empty."""
    from cloister.prove.battery import promises

    text = (Path(__file__).parents[3] / "SPECIFICATION.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (P-\d{3}) \| (.+?) \| .+? \|$", text, re.MULTILINE))
    words = promises()

    assert rows == words
    for case in load().values():
        assert case.promise in rows, case.id
        assert case.classes, case.id
        assert case.expect, case.id
