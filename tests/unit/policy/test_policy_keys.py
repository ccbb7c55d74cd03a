"""`credentials.NAME.keys`: what may be said about keys that stay in the person's own agents."""

import pytest

from cloister.errors import PolicyError
from cloister.policy.load import load

NAME = "SHA256:" + "A" * 43
GPG = "gpg:" + "A" * 40


def mistakes(table: str) -> int:
    """Return how many mistakes one credential has."""
    try:
        load(f'schema = 1\n[agents.a]\ncommand = ["x"]\n[agents.a.credentials.k]\n{table}\n', "p.toml")
    except PolicyError as error:
        return len(error.problems)
    return 0


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("keys = ['SHA256:short']\nhosts = ['a.b']", f"keys = ['{NAME}']\nhosts = ['a.b']"),
        ("keys = ['~/.ssh/id']\nhosts = ['a.b']", "keys = ['~/.ssh/id.pub']\nhosts = ['a.b:2222']"),
        (f"keys = ['{NAME}']", f"keys = ['{NAME}']\nuses = ['git']"),
        (f"keys = ['{NAME}']\nhosts = ['*.a.b']", f"keys = ['{NAME}']\nhosts = ['x.a.b']"),
        (f"keys = ['{NAME}']\nhosts = ['192.0.2.1']", f"keys = ['{NAME}']\nhosts = ['host.cloister.internal:22']"),
        (
            f"keys = ['{NAME}']\nhosts = ['a.b']\nenv = 'K'",
            f"keys = ['{NAME}']\nhosts = ['a.b']\nuses = ['ssh', 'git']",
        ),
        (f"keys = ['{GPG}']\nhosts = ['a.b']\nuses = ['ssh', 'gpg']", f"keys = ['{GPG}']\nuses = ['gpg']"),
        (f"keys = ['{NAME}', '{GPG}']\nuses = ['git']", f"keys = ['{NAME}', '{GPG}']\nuses = ['git', 'gpg']"),
        (f"keys = ['{NAME}']\nuses = ['git', 'gpg']", f"keys = ['{NAME}']\nuses = ['git']"),
        ("keys = ['gpg:ABCD']\nuses = ['gpg']", f"keys = ['gpg:{'a' * 40}']\nuses = ['gpg']"),
        (f"keys = ['{NAME}']\nuses = ['files']", f"keys = ['{NAME}']\nuses = ['git']"),
    ],
)
def test_each_mistake_is_found_and_its_neighbour_is_none(bad: str, good: str) -> None:
    """A key that nothing is said about, and a use without a key, would do nothing: both are mistakes."""
    assert mistakes(bad) == 1
    assert mistakes(good) == 0


def test_a_gpg_key_with_the_default_use_is_two_mistakes() -> None:
    """The default use is logging in by ssh, which no gpg key does; both sides of the mistake are named."""
    assert mistakes(f"keys = ['{GPG}']\nhosts = ['a.b']") == 2
