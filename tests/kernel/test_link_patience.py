"""A guest that is silent at its start is given up when the keeper's patience is over; one whose agent runs is not."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from fake_guest import Fake, stream_of, u32
from keeper_rig import Keeper, Place, place_of_test

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)
PATIENCE_S = 1


@pytest.fixture
def fake(place: Place) -> Iterator[Fake]:
    """A keeper with little patience, and a fake guest that has said nothing yet."""
    made = Fake(place, "--patience", str(PATIENCE_S))
    yield made
    made.close()


def given_up(fake: Fake, lacks: str) -> None:
    """Expect the end of a start: its reason, the failure of the agent, and no process left, in time."""
    started = time.monotonic()
    died = fake.keeper.died()
    assert (died["reason"], died["text"]) == ("guest-silent", f"the guest did not {lacks} within {PATIENCE_S} s")
    assert fake.keeper.until("Y", 0)[8:] == b"monitor"
    assert fake.keeper.over(5) == 125
    assert time.monotonic() - started < PATIENCE_S + 2


def test_a_guest_that_never_speaks_is_given_up(fake: Fake) -> None:
    """Connected, asked to join, and not a word."""
    fake.guest.until("J")
    given_up(fake, "say hello")


def test_a_guest_that_says_hello_and_no_more_is_given_up(fake: Fake) -> None:
    """It joins, takes all that it is sent, and never reports its walls."""
    fake.guest.joined()
    fake.guest.until("F")
    given_up(fake, "report its walls")


def test_words_that_are_no_hello_do_not_prolong_it(fake: Fake) -> None:
    """A byte now and then, as a former session could have left them, is no sign of life."""
    fake.guest.until("J")
    until = time.monotonic() + PATIENCE_S - 0.3
    while time.monotonic() < until:
        fake.guest.raw(b"x")
        time.sleep(0.1)
    given_up(fake, "say hello")


def test_a_monitor_whose_guest_never_opens_its_port_is_given_up(place: Place) -> None:
    """The channel is there and nobody at its other end, as with a kernel that hangs."""
    keeper = Keeper(place, "--patience", "1", monitor=["/bin/sleep", "60"])
    keeper.send_begin()
    assert keeper.died()["text"] == "the guest did not say hello within 1 s"
    assert keeper.over(5) == 125
    keeper.close()


def test_silence_of_a_run_is_nobodys_business(place: Place) -> None:
    """Walls reported in time: how long it takes until the agent starts, or speaks, is not the keeper's to judge."""
    fake = Fake(place, "--patience", "2")
    (theirs_in, given), (out, theirs_out) = os.pipe(), os.pipe()
    fake.guest.begun()
    fake.keeper.until("P")
    time.sleep(2.2)
    fake.keeper.go("/bin/agent", stdio=[theirs_in, theirs_out, theirs_out])
    fake.guest.until("G")
    fake.guest.send("R", u32(0, 42))
    fake.fine()
    fake.guest.send("D", u32(stream_of(0, 1)) + b"late")
    assert os.read(out, 10) == b"late"
    for fd in (theirs_in, given, out, theirs_out):
        os.close(fd)
    fake.close()


@pytest.mark.parametrize("word", ["0", "-1", "", "3601", "2s", "1e3"])
def test_a_patience_that_is_none_starts_nothing(place: Place, word: str) -> None:
    """Without a bound, or with one that cannot be read, there is no keeper."""
    keeper = Keeper(place, "--patience", word, monitor=["/bin/sleep", "60"])
    assert keeper.over(5) == 125
    keeper.close()
