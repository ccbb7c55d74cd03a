"""Manual pages and completion: made from the verbs themselves, current, and safe for roff and shells."""

from pathlib import Path

import pytest

from cloister.cli import completion, manual
from cloister.cli.entry import VERBS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted(manual.pages()))
def test_committed_pages_are_current(name: str) -> None:
    """docs/man holds what the sources say now; `python -m cloister.cli.manual docs/man` renews it."""
    assert (ROOT / "docs/man" / name).read_text(encoding="utf-8") == manual.pages()[name]


def test_every_verb_that_can_be_called_has_a_page() -> None:
    """A verb without `parser()` or USAGE would be missing from manual and completion."""
    written = {path.stem for path in (ROOT / "src/cloister/cli").glob("*.py")} & set(VERBS)

    assert {text.verb for text in manual.texts()} == written


def test_pages_say_what_a_verb_takes() -> None:
    """Options, arguments, exit codes and examples stand in the page; hyphens can be copied."""
    page = manual.pages()["cloister-stop.1"]

    assert "\\fB\\-\\-grace\\fR \\fITIME\\fR" in page
    assert ".B cloister stop last" in page
    assert ".B 64" in page
    assert "--" not in page.replace("\\-\\-", "")


def test_run_speaks_as_env_does() -> None:
    """The page of `run` lists 124 to 127, not sysexits(3)."""
    page = manual.pages()["cloister-run.1"]

    assert ".B 126" in page
    assert ".B 78" not in page


def test_references_are_read_from_the_sources(tmp_path: Path) -> None:
    """Plain and formatted messages, and keyword references, are found with their exit codes."""
    (tmp_path / "m.py").write_text(
        'raise UsageError("no-such-thing", f"no {x} here", remedy="y")\n'
        'raise PolicyError([p], reference="policy-odd")\nfoo("not-an-error", "x")\n'
    )

    assert manual.references(tmp_path) == {"no-such-thing": (64, "no ... here"), "policy-odd": (78, "")}


def test_the_main_page_lists_errors() -> None:
    """cloister(1) names the references a person meets."""
    page = manual.pages()["cloister.1"]

    for reference in ("policy-missing", "run-unknown", "broker-unreachable", "workspace-home"):
        assert reference.replace("-", "\\-") in page


@pytest.mark.parametrize("text", [".so /etc/passwd", "'br", "a\\fBb", "~x ^y", "-o"])
def test_roff_finds_no_command_in_text(text: str) -> None:
    """Text that begins with a dot or quote, or holds a backslash, is printed and not obeyed."""
    shown = manual._prose(text)

    assert not shown.startswith((".", "'"))
    assert "\\f" not in shown


@pytest.mark.parametrize("shell", [completion.bash, completion.zsh, completion.fish])
def test_scripts_name_every_verb_and_option(shell: object) -> None:
    """No verb and no long option is missing from a completion script."""
    script = shell()  # type: ignore[operator]
    for text in manual.texts():
        assert text.verb in script
        for option in text.options:
            for name in option.names:
                if name.startswith("--"):
                    assert name.removeprefix("--") in script
