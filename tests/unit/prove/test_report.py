"""Reports: what is not a pass never looks like one."""

import xml.etree.ElementTree as ET

import pytest

from cloister.prove.case import parse
from cloister.prove.report import as_json, exit_code, junit, summary, text
from cloister.prove.runner import OUTCOMES, Result

CASE = parse(
    'ID = "x"\nTITLE = "t"\nPROMISE = "P-001"\nCLASSES = (1,)\nEXPECT = "e"\ndef attack(box):\n    pass\n', "x.py"
)


def results(*outcomes: str, detail: str = "why") -> list[Result]:
    """Return results with these outcomes."""
    return [Result(case=CASE, outcome=outcome, detail=detail) for outcome in outcomes]


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (("denied",), 0),
        (("denied", "opted-out", "warned"), 0),
        (("denied", "allowed", "error"), 1),
        (("denied", "error"), 69),
        (("denied", "cannot-run"), 69),
        (("opted-out",), 69),
        ((), 69),
    ],
)
def test_exit_codes(outcomes: tuple[str, ...], code: int) -> None:
    """0 only when something was denied and nothing is unclear; 1 wins over 69."""
    assert exit_code(results(*outcomes)) == code


def test_the_summary_names_what_is_not_a_pass() -> None:
    """Breaches are loud, doubts and warnings are named."""
    shown = summary(results(*OUTCOMES))

    assert "ATTACKS GOT THROUGH: x" in shown
    assert "not proved: x, x" in shown
    assert "not prevented, but reported when the run ends: x" in shown


def test_text_from_the_sandbox_is_made_harmless() -> None:
    """Escape sequences and markup of an attacker reach neither the terminal nor the XML."""
    hostile = results("allowed", "denied", detail="\x1b]0;x\x07<script>&\0")

    assert "\x1b" not in text(hostile, {})
    suite = ET.fromstring(junit(hostile, 'a"<b'))  # noqa: S314  # our own output
    assert suite.get("failures") == "1"


def test_junit_counts_every_kind() -> None:
    """Failures are breaches, errors proved nothing, skips were not tried."""
    suite = ET.fromstring(junit(results(*OUTCOMES), "shell"))  # noqa: S314  # our own output
    counts = tuple(suite.get(name) for name in ("tests", "failures", "errors", "skipped"))

    assert counts == ("7", "1", "1", "3")


def test_json_holds_the_header_of_each_case() -> None:
    """A reader needs no second file."""
    (case,) = as_json(results("denied"), "shell")["cases"]

    assert (case["id"], case["promise"], case["expect"], case["outcome"]) == ("x", "P-001", "e", "denied")
