"""Accounts: static names and numbers, never two for one owner, never one for two, never one that was another's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import UnsupportedError
from cloister.identity.accounts import MAX_NAME, Entry, Owner, account_name, assign, find
from cloister.plan.unit import FIRST_UID, UID_COUNT, Account

NAMES = st.builds(str.__add__, st.sampled_from("ab"), st.text("abz09-", max_size=31))
USERS = st.builds(str.__add__, st.sampled_from("ab_"), st.text("abz09_-", max_size=31))
OWNERS = st.one_of(
    st.builds(Owner, agent=NAMES, user=USERS, service=st.just("")),
    st.builds(Owner, agent=NAMES, user=st.just(""), service=NAMES),
)


def test_names_say_whose_they_are() -> None:
    """An agent of a user and an instance of a service are called by their names."""
    assert account_name(Owner("pi", "alice")) == "cl-pi-alice"
    assert account_name(Owner("openclaw", service="gateway-home")) == "cl-gateway-home"


@given(OWNERS)
def test_every_name_is_one_that_systems_take(owner: Owner) -> None:
    """At most 31 characters, letters, digits and hyphens, whatever agents and users are called."""
    name = account_name(owner)
    assert len(name) <= MAX_NAME
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name.startswith("cl-")


@given(st.lists(OWNERS, max_size=12), st.lists(OWNERS, max_size=12))
def test_no_account_is_ever_shared_changed_or_given_again(before: list[Owner], after: list[Owner]) -> None:
    """Whoever comes and goes: names and numbers are unique, and what was recorded stays as it was."""
    first = assign(before, (), ())
    second = assign(after, first, [Entry(account.name, account.uid) for account in first])
    assert [(one.name, one.uid) for one in second[: len(first)]] == [(one.name, one.uid) for one in first]
    assert len({one.uid for one in second}) == len({one.name for one in second}) == len(second)
    assert all(FIRST_UID <= one.uid < FIRST_UID + UID_COUNT for one in second)
    for owner in after:
        assert find(second, owner).user == owner.user
    assert assign(after, second, ()) == second


def test_two_owners_that_come_to_one_name_get_two() -> None:
    """Agent `a-b` for `c` and agent `a` for `b-c` would both be cl-a-b-c: one of them gets a hash."""
    one, other = assign([Owner("a-b", "c"), Owner("a", "b-c")], (), ())
    assert {one.name, other.name} > {"cl-a-b-c"}
    assert one.uid != other.uid
    long = assign([Owner("a" * 32, user) for user in ("b", "c")], (), ())
    assert len({account.name for account in long}) == 2


def test_a_service_keeps_its_account_when_another_agent_serves_it() -> None:
    """Its files are the service's, not the agent's."""
    first = assign([Owner("old", service="gw")], (), ())
    second = assign([Owner("new", service="gw")], first, ())
    assert (second[0].uid, second[0].name, second[0].agent) == (first[0].uid, first[0].name, "new")


def test_a_stranger_in_our_range_is_refused() -> None:
    """Somebody else with a number of ours could read an agent's files; a number beside the range disturbs nobody."""
    with pytest.raises(UnsupportedError) as caught:
        assign([Owner("pi", "alice")], (), [Entry("mallory", FIRST_UID + 7)])
    assert caught.value.reference == "uid-range-taken"
    assert assign([Owner("pi", "alice")], (), [Entry("mallory", FIRST_UID - 1), Entry("eve", FIRST_UID + UID_COUNT)])


def test_an_account_of_ours_with_another_number_is_refused() -> None:
    """Otherwise hostd would start an agent as whoever has the recorded number."""
    recorded = (Account(name="cl-pi-alice", uid=FIRST_UID, agent="pi", user="alice"),)
    with pytest.raises(UnsupportedError) as caught:
        assign([], recorded, [Entry("cl-pi-alice", 1000)])
    assert caught.value.reference == "account-changed"
    assert assign([], recorded, [Entry("cl-pi-alice", FIRST_UID)]) == recorded


def test_names_of_the_host_are_never_taken_over() -> None:
    """An account of the name that we did not make is left alone: ours gets a hash, and without room for that, none."""
    account = assign([Owner("pi", "alice")], (), [Entry("cl-pi-alice", 1000)])[0]
    assert account.name not in {"cl-pi-alice", ""}
    with pytest.raises(UnsupportedError) as caught:
        assign([Owner("pi", "alice")], (), [Entry("cl-pi-alice", 1000), Entry(account.name, 1001)])
    assert caught.value.reference == "account-name-taken"


def test_a_full_range_is_an_error_and_not_somebody_elses_number() -> None:
    """When all numbers are given out, nothing is given twice."""
    recorded = [Account(name=f"cl-x-{n}", uid=FIRST_UID + n, agent="x", user=f"u{n}") for n in range(UID_COUNT)]
    with pytest.raises(UnsupportedError) as caught:
        assign([Owner("pi", "alice")], recorded, ())
    assert caught.value.reference == "uid-range-full"
