"""A login that is kept: when it wants renewing, what an answer changes, and that it shows no token."""

from __future__ import annotations

import msgspec
import pytest

from cloister.credentials import logins
from cloister.credentials.oauth_answers import Granted
from cloister.policy.login import Login

T = 1_800_000_000.0
LOGIN = Login(
    authorize_url="https://a.example/x", token_url="https://a.example/t", client_id="c", hosts=("api.example",)
)


def granted(lifetime: float | None = 3600.0, access: str = "at-1", refresh: str = "rt-1") -> Granted:
    """Return what a provider gave."""
    return Granted(access, refresh, lifetime, ("s",), "person@example.org", {})


def kept(lifetime: float | None = 3600.0, refresh: str = "rt-1") -> logins.Kept:
    """Return a login made at T."""
    return logins.new("claude", "claude", LOGIN, granted(lifetime, refresh=refresh), T)


@pytest.mark.parametrize(
    ("lifetime", "after", "state"),
    [
        (3600.0, 0, "good"),
        (3600.0, 3299, "good"),
        (3600.0, 3301, "due"),
        (3600.0, 3594, "due"),
        (3600.0, 3596, "expired"),
        (3600.0, 9999, "expired"),
        (60.0, 50, "good"),
        (60.0, 54.5, "due"),
        (60.0, 56, "expired"),
        (None, 10**9, "good"),
        (3600.0, -60, "good"),
        (3600.0, -7200, "due"),
    ],
)
def test_tokens_are_renewed_before_they_end(lifetime, after, state):
    """A tenth of the lifetime ahead, at most 5 minutes; a clock that was set back makes a token due, too."""
    assert logins.judge(kept(lifetime), T + after) == state


def test_a_provider_of_short_tokens_cannot_keep_us_asking():
    """A token that was just renewed counts as good for a second, even when it says that it has ended."""
    short = logins.renewed(kept(), granted(0.001, access="at-2"), T + 50, forced=False)

    assert logins.judge(short, T + 50.5) == "good"
    assert logins.judge(short, T + 51.5) == "expired"


def test_jitter_only_makes_it_earlier():
    """Processes that share a login do not ask at one moment."""
    assert logins.judge(kept(), T + 3100, 0.0) == "good"
    assert logins.judge(kept(), T + 3100, 0.9) == "due"


def test_without_a_refresh_token_nothing_is_due():
    """Such a login is used to its end."""
    assert logins.judge(kept(refresh=""), T + 3400) == "good"
    assert logins.judge(kept(refresh=""), T + 3600) == "expired"


def test_after_a_broken_off_renewal_the_access_token_is_used_to_its_end():
    """The refresh token may be used up, and showing it again may end everything."""
    begun = logins.begun(kept(), T + 3300)

    assert logins.judge(begun, T + 3400) == "good"
    assert logins.judge(begun, T + 3599) == "expired"


def test_renewal_takes_what_is_new_and_keeps_what_is_not():
    """A new refresh token replaces the old; without one the old stays in use (RFC 6749 section 6)."""
    begun = logins.begun(kept(), T + 10)

    rotated = logins.renewed(begun, granted(access="at-2", refresh="rt-2"), T + 11, forced=False)
    same = logins.renewed(begun, granted(access="at-2", refresh=""), T + 11, forced=True)

    assert (rotated.access_token, rotated.refresh_token, rotated.renewing) == ("at-2", "rt-2", None)
    assert rotated.expires == T + 11 + 3600
    assert (same.refresh_token, same.forced) == ("rt-1", True)


def test_a_refusal_forces_one_renewal_not_a_storm():
    """A token that was just renewed because of a 401 is not renewed again for the next one; later it may be."""
    forced = logins.renewed(kept(), granted(access="at-2"), T, forced=True)

    assert logins.may_force(kept(), T)
    assert not logins.may_force(forced, T + 30)
    assert logins.may_force(forced, T + 700)
    assert logins.may_force(forced, T - 500)
    assert not logins.may_force(kept(refresh=""), T)


def test_an_ended_login_has_no_tokens():
    """What is worth nothing is not kept."""
    over = logins.ended(kept(), "invalid_grant")

    assert logins.judge(over, T) == "ended"
    assert b"at-1" not in logins.encode(over)
    assert b"rt-1" not in logins.encode(over)


def test_nothing_that_is_shown_holds_a_token():
    """Neither repr nor the description, nor the error of a broken file."""
    login = kept()

    shown = repr(login) + repr(logins.describe(login, T)) + msgspec.json.encode(logins.describe(login, T)).decode()
    assert "at-1" not in shown
    assert "rt-1" not in shown
    assert logins.describe(login, T).account == "person@example.org"


def test_a_file_is_a_login_or_nothing():
    """Written and read again it is the same; broken, foreign or from another version it is none."""
    data = logins.encode(kept())

    assert logins.decode(data) == kept()
    for broken in (b"", b"{}", data[:-9], data.replace(b'"format": 1', b'"format": 2'), b"[" * 100_000, b"\xff"):
        assert logins.decode(broken) is None
