"""Arguments: argparse's mistakes are ours, with something to type; every verb describes itself."""

import importlib

import pytest

from cloister.cli.arguments import Parser
from cloister.cli.manual import described_verbs
from cloister.errors import UsageError


def _parser() -> Parser:
    verb = Parser("try", "Try.")
    verb.add_argument("--json", action="store_true")
    verb.add_argument("--count", type=int)
    verb.add_argument("name", nargs="?")
    return verb


@pytest.mark.parametrize(
    ("words", "reference", "hint"),
    [
        (["--jsn"], "option-unknown", "did you mean --json?"),
        (["--zzzzzz"], "option-unknown", "cloister try --help"),
        (["--js"], "option-unknown", "did you mean --json?"),
        (["a", "b"], "argument-unknown", "cloister try --help"),
        (["--count", "x"], "usage", "cloister try --help"),
        (["--count"], "usage", "cloister try --help"),
    ],
)
def test_mistakes_are_usage_errors(words: list[str], reference: str, hint: str) -> None:
    """A wrong option never exits by itself: it is an error with code 64 and a hint; abbreviations are not guessed."""
    with pytest.raises(UsageError) as caught:
        _parser().read(words)

    assert caught.value.exit_code == 64
    assert (caught.value.reference, caught.value.remedy) == (reference, hint)


def test_right_words_are_read() -> None:
    """Options and arguments arrive in any order."""
    found = _parser().read(["name", "--count", "3", "--json"])

    assert (found.json, found.count, found.name) == (True, 3, "name")


@pytest.mark.parametrize("name", described_verbs())
def test_every_verb_explains_itself(name: str) -> None:
    """Each verb has a summary, an example, and help for every option and argument."""
    verb = importlib.import_module(f"cloister.cli.{name}").parser()

    assert verb.verb == name
    assert verb.summary.endswith(".")
    assert verb.examples
    assert all(command.removeprefix("sudo ").startswith("cloister ") for command, _ in verb.examples)
    assert all(action.help for action in verb.actions() if action.dest != "action")
