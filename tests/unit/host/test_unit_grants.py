"""Grants and roots as text, and the command line for systemd: what needs no machine."""

from __future__ import annotations

import pytest

from cloister.errors import DeniedError, UnsupportedError
from cloister.host import unit_grants
from cloister.host.unit_caller import Caller
from cloister.plan.unit import FIRST_UID, Account, Grant, System

ALICE = Caller(1000, 1000, 1, "alice", "/home/alice", ())
ACCOUNT = Account(name="cl-pi-alice", uid=FIRST_UID, agent="pi", user="alice")
GRANT = Grant(user="alice", agent="pi", account="cl-pi-alice", roots=("~",))


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("~", "/home/alice"), ("~/p", "/home/alice/p"), ("p/x", "/home/alice/p/x"), ("/srv/x", "/srv/x"), ("/", "/"),
        ("~/p/", "/home/alice/p"), ("/srv//x/.", "/srv/x"), ("~bob", "/home/alice/~bob"), ("", "/home/alice"),
    ],
)  # fmt: skip
def test_roots_are_relative_to_the_callers_home(root: str, path: str) -> None:
    """`~`, `~/x` and bare names are below the caller's own home, absolute ones are themselves, and `/` is a root."""
    assert unit_grants.expand_root(root, "/home/alice") == path


@pytest.mark.parametrize(("root", "home"), [("~/..", "/home/alice"), ("../bob", "/home/alice"), ("~", ""), ("p", "x")])
def test_no_root_goes_up(root: str, home: str) -> None:
    """A root with `..`, or of a caller without a home, is none."""
    with pytest.raises(DeniedError):
        unit_grants.expand_root(root, home)


def test_a_grant_is_for_one_user_and_agent() -> None:
    """Only the user and the agent that a grant names get its account, and the account must be theirs."""
    system = System(accounts=(ACCOUNT,), grants=(GRANT,))
    assert unit_grants.find_grant(system, ALICE, "pi") == (GRANT, ACCOUNT)
    for caller, agent in ((ALICE, "claude"), (ALICE._replace(name="bob"), "pi")):
        with pytest.raises(DeniedError, match="is not allowed to use"):
            unit_grants.find_grant(system, caller, agent)
    bobs = Account(name="cl-pi-alice", uid=FIRST_UID, agent="pi", user="bob")
    for accounts in ((), (bobs,)):
        with pytest.raises(UnsupportedError):
            unit_grants.find_grant(System(accounts=accounts, grants=(GRANT,)), ALICE, "pi")
