"""Documents: links resolve, promises have numbers and tests, the threat model has a state and a proof per row."""

import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
PROMISE = re.compile(r"^\| (P-\d{3}) \| (.+?) \| (.+?) \|$", re.MULTILINE)
THREAT = re.compile(r"^\| (T-\d{2,3}) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[^`]+)`")
_BATTERIES = r"`tests/(?:escape/test_(?:battery|armed)|systemd/test_prove_unit)\.py(?:::\w+)?`"
CASES = re.compile(_BATTERIES + r": ([a-z0-9, -]+)")
STATES = {"mitigated", "partial", "open", "pending"}


def _slug(heading: str) -> str:
    """Return the anchor that Markdown renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(text: str) -> set[str]:
    """Return the anchors of all headings of a document."""
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def _missing_tests(root: Path, cell: str) -> list[str]:
    """Return the tests, and cases of the battery, named in a table cell that do not exist."""
    cases = [name.strip() for found in CASES.findall(cell) for name in found.split(",")]
    folder = root / "src/cloister/prove/cases"
    missing = [name for name in cases if not (folder / f"{name.replace('-', '_')}.py").exists()]
    for name in TEST.findall(cell):
        path, _, function = name.partition("::")
        target = root / path
        if not target.exists() or (
            function and not re.search(rf"def {re.escape(function)}\b", target.read_text("utf-8"))
        ):
            missing.append(name)
    return missing


def test_links_resolve(root: Path, text_files: dict[Path, str]) -> None:
    """Every relative link in Markdown leads to a file, and to a heading where it names one."""
    broken = []
    for path, text in text_files.items():
        if path.suffix != ".md":
            continue
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for link in LINK.findall(prose):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name) if name else path
            if not target.exists() or (anchor and anchor not in _anchors(target.read_text("utf-8"))):
                broken.append(f"{path.name}: {link}")

    assert not broken


def test_promises_are_numbered_and_name_their_tests(root: Path) -> None:
    """Each promise has a number of its own, and names tests that exist or says *pending* and why."""
    text = (root / "SPECIFICATION.md").read_text(encoding="utf-8")
    rows = PROMISE.findall(text)
    numbers = [number for number, _, _ in rows]

    assert len(rows) > 50
    assert len(rows) == len(re.findall(r"^\| P-", text, re.MULTILINE)), "a row has not three columns"
    assert len(numbers) == len(set(numbers)), "a number is used twice"
    for part in text.split("\n## "):  # a promise that gets its test moves, and keeps its number
        held = [number for number, _, _ in PROMISE.findall(part)]
        assert held == sorted(held), "numbers rise"
    for number, _, proof in rows:
        assert re.match(r"\*pending\*: .", proof) or TEST.search(proof), number
        assert not _missing_tests(root, proof), number


def test_every_threat_has_a_state_and_a_proof(root: Path) -> None:
    """Each row of the threat model says mitigated, partial, open or pending; what is mitigated names its test."""
    text = (root / "SECURITY.md").read_text(encoding="utf-8")
    rows = THREAT.findall(text)

    assert len(rows) > 20
    assert len(rows) == len(re.findall(r"^\| T-", text, re.MULTILINE)), "a row has not five columns"
    assert [row[0] for row in rows] == [f"T-{number:02}" for number in range(1, len(rows) + 1)], "numbers count"
    for number, _, state, _, proof in rows:
        assert state in STATES, number
        assert state != "mitigated" or TEST.search(proof), number
        assert not _missing_tests(root, proof), number
