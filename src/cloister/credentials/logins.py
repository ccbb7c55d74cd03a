"""A login that is kept: what is stored of it, when its access token wants renewing, and what each answer changes.

Values and transitions; the clock comes in as a number. The file is for `host/logins.py`, and the one who
may renew for `runs/login_renewal.py`. Times are seconds since the epoch, for they outlive a process. A clock
that was set back shows as an access token from the future: it is renewed, once, and has the new time then.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cloister.credentials.oauth_answers import Granted
from cloister.policy.login import Login

State = Literal["good", "due", "expired", "ended"]
"""`due`: still good, and time to renew. `ended`: only a new login helps."""

_MARGIN_S = 300.0
_MARGIN_SHARE = 0.1
_SAFETY_S = 5.0
"""An access token that ends within this is not sent any more: it may end on its way."""
_FORCED_AGAIN_S = 600.0
"""How soon refusals of hosts may make us renew again: an agent can bring them about at will."""
_FRESH_S = 1.0
"""A token that was just renewed is used, however short its life is: a provider cannot keep us asking."""
_SKEW_S = 120.0
"""How far in the future an access token may have been issued before the clock is not believed."""


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One login, as stored. It holds tokens: it is never printed, logged or sent."""

    format: Literal[1]
    name: str
    login: Login
    """The provider, as it was when the person logged in."""
    preset: str
    access_token: str
    refresh_token: str = ""
    """Empty where the provider gave none: the login ends with its access token."""
    scopes: tuple[str, ...] = ()
    account: str = ""
    details: dict[str, str] = msgspec.field(default_factory=dict)
    made: float
    """When the person logged in."""
    issued: float
    """When the access token came."""
    expires: float | None = None
    """When it ends; None where nobody says, so that only a refusal of a host tells."""
    renewing: float | None = None
    """When a renewal was begun whose answer was not stored. The refresh token may be used up."""
    forced: bool = False
    """Whether the access token came from a renewal after a host had refused its predecessor."""
    ended: str = ""
    """Why nothing but a new login helps: the provider's error code."""

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Show no token."""
        return f"Kept(name={self.name!r})"


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What may be known of a login: no token, and nothing one could be made from."""

    name: str
    preset: str
    account: str
    scopes: tuple[str, ...]
    state: State
    made: float
    renewed: float
    expires: float | None
    renewable: bool
    token_url: str
    hosts: tuple[str, ...]
    headers: dict[str, str]
    product: Literal["", "claude", "codex"]
    product_file: str
    details: dict[str, str]


def new(name: str, preset: str, login: Login, granted: Granted, now: float) -> Kept:
    """Return a login that was just made."""
    return Kept(
        format=1,
        name=name,
        login=login,
        preset=preset,
        access_token=granted.access_token,
        refresh_token=granted.refresh_token,
        scopes=granted.scopes or login.scopes,
        account=granted.account,
        details=granted.details,
        made=now,
        issued=now,
        expires=None if granted.lifetime_s is None else now + granted.lifetime_s,
    )


def judge(kept: Kept, now: float, jitter: float = 0.0) -> State:
    """Say what is to be done with an access token.

    After a renewal whose answer was lost the refresh token may be used up, and a provider that sees it a second time
    may end everything: the access token is used to its end first.

    Args:
        kept: the login.
        now: seconds since the epoch.
        jitter: from 0 to 1: spreads renewals, so that several processes do not ask at one moment.
    """
    if kept.ended:
        return "ended"
    if kept.expires is None:
        return "good"
    lifetime = kept.expires - kept.issued
    left = kept.expires - now
    if kept.issued != kept.made and 0 <= now - kept.issued < _FRESH_S:
        return "good"
    if left <= min(_SAFETY_S, lifetime * _MARGIN_SHARE):
        return "expired"
    if not kept.refresh_token or kept.renewing is not None:
        return "good"
    margin = min(_MARGIN_S, lifetime * _MARGIN_SHARE) * (1.0 + jitter)
    return "due" if left <= margin or now < kept.issued - _SKEW_S else "good"


def may_force(kept: Kept, now: float) -> bool:
    """Return whether a refusal of a host is a reason to renew: not for a token that was just renewed for one."""
    return bool(kept.refresh_token) and not (kept.forced and 0 <= now - kept.issued < _FORCED_AGAIN_S)


def begun(kept: Kept, now: float) -> Kept:
    """Return what is stored before a refresh token is sent."""
    return msgspec.structs.replace(kept, renewing=now)


def renewed(kept: Kept, granted: Granted, now: float, *, forced: bool) -> Kept:
    """Return what is stored before the new access token is used; a new refresh token takes the place of the old."""
    return msgspec.structs.replace(
        kept,
        access_token=granted.access_token,
        refresh_token=granted.refresh_token or kept.refresh_token,
        scopes=granted.scopes or kept.scopes,
        account=granted.account or kept.account,
        details=kept.details | granted.details,
        issued=now,
        expires=None if granted.lifetime_s is None else now + granted.lifetime_s,
        renewing=None,
        forced=forced,
    )


def ended(kept: Kept, code: str) -> Kept:
    """Return a login that is over; its tokens are forgotten."""
    return msgspec.structs.replace(kept, access_token="", refresh_token="", renewing=None, ended=code)


def describe(kept: Kept, now: float) -> Description:
    """Return what may be known of a login."""
    return Description(
        name=kept.name,
        preset=kept.preset,
        account=kept.account,
        scopes=kept.scopes,
        state=judge(kept, now),
        made=kept.made,
        renewed=kept.issued,
        expires=kept.expires,
        renewable=bool(kept.refresh_token),
        token_url=kept.login.token_url,
        hosts=kept.login.hosts,
        headers=kept.login.headers,
        product=kept.login.product,
        product_file=kept.login.product_file,
        details=kept.details,
    )


def encode(kept: Kept) -> bytes:
    """Return the file's content."""
    return msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n"


def decode(data: bytes) -> Kept | None:
    """Return the login of a file's content, or None where it is none; no error here could quote a token."""
    try:
        return msgspec.json.decode(data, type=Kept)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
