"""What a provider's token, device and revocation endpoints answer (RFC 6749 section 5, RFC 8628, RFC 7009).

Hostile input: bounded by the caller, checked here, and never quoted. Of an error only its code is kept, and
only where it looks like one, for a description may repeat what was sent.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

MAX_LIFETIME_S = 10 * 365 * 86400
_MAX_TOKEN = 16 * 1024
_TOKEN = re.compile(r"[\x21-\x7e]+")  # VSCHAR, RFC 6749 appendix A; a line break would end a header
_CODE = re.compile(r"[a-z]{2,24}(?:[_-][a-z]{2,24}){0,5}")  # no digits: an echoed token is no code
_CLAIMS = "https://api.openai.com/auth"

Kind = Literal["ended", "pending", "slow-down", "refused", "later"]
"""`ended`: the grant is worth nothing any more. `pending`, `slow-down`: the person has not agreed yet (RFC 8628).
`later`: passing trouble. `refused`: everything else, which asking again does not mend."""

_ENDED = frozenset({"invalid_grant", "refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated",
                    "expired_token"})  # fmt: skip
_PENDING: dict[str, Kind] = {"authorization_pending": "pending", "slow_down": "slow-down"}


class AnswerError(Exception):
    """What a provider answered is no token. `code` is its error code, or one of ours such as `not-json`."""

    def __init__(self, kind: Kind, code: str, *, retry_after_s: float = 0.0) -> None:
        """Keep what decides about the next step."""
        super().__init__(code)
        self.kind = kind
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Granted:
    """What a token answer gives."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    """Empty where the answer has none: the old one stays in use (RFC 6749 section 6)."""
    lifetime_s: float | None
    """Seconds the access token is good for; None where nobody says."""
    scopes: tuple[str, ...]
    account: str
    """Whose login it is, for people: an email address where there is one."""
    details: dict[str, str]
    """What the product wants to know of the account: names of `products.DETAILS`, no secrets."""


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """What a device flow begins with (RFC 8628 section 3.2)."""

    device_code: str = field(repr=False)
    user_code: str
    address: str
    complete_address: str
    lifetime_s: float
    interval_s: float


def read_token_answer(status: int, body: bytes, now: float, *, retry_after_s: float = 0.0) -> Granted:
    """Return the tokens of an answer.

    A missing `token_type` counts as Bearer, for some providers leave it out when they renew; another one is refused:
    the token would be sent in a way it is not meant for (RFC 6749 section 7.1).

    Args:
        status: the HTTP status.
        body: the whole body; the caller bounds it.
        now: seconds since the epoch, for access tokens that tell their own end.
        retry_after_s: the answer's Retry-After, or 0.

    Raises:
        AnswerError: it holds none that can be used.
    """
    found = _object(status, body, retry_after_s)
    access = _token(found, "access_token")
    if not access:
        raise AnswerError("refused", "access-token-missing")
    kind = found.get("token_type", "Bearer")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise AnswerError("refused", "token-type-unknown")
    lifetime = _seconds(found.get("expires_in"))
    if lifetime is None:
        lifetime = _own_lifetime(access, now)
    account, details = _account(found)
    scope = found.get("scope")
    scopes = tuple(scope.split()) if isinstance(scope, str) and len(scope) <= _MAX_TOKEN else ()
    return Granted(access, _token(found, "refresh_token"), lifetime, scopes, account, details)


def read_device_answer(status: int, body: bytes) -> DeviceCode:
    """Return what a device flow begins with.

    Raises:
        AnswerError: the provider refuses, or the answer lacks something.
    """
    found = _object(status, body, 0.0)
    device, user = _token(found, "device_code"), found.get("user_code")
    address = found.get("verification_uri", found.get("verification_url"))
    complete = found.get("verification_uri_complete", "")
    lifetime = _seconds(found.get("expires_in"))
    if not device or not _shown(user, 64) or not _shown(address, 2048) or lifetime is None:
        raise AnswerError("refused", "device-answer-incomplete")
    if urlsplit(str(address)).scheme not in ("https", "http"):
        raise AnswerError("refused", "device-address-unusable")
    complete = complete if _shown(complete, 2048) and urlsplit(str(complete)).scheme in ("https", "http") else ""
    interval = _seconds(found.get("interval")) or 5.0
    return DeviceCode(device, str(user), str(address), str(complete), min(lifetime, 3600.0), min(interval, 60.0))


def read_revoke_answer(status: int, body: bytes) -> None:
    """Accept an answer of the revocation endpoint; a token it does not know is revoked as well (RFC 7009 section 2.2).

    Raises:
        AnswerError: it was not revoked.
    """
    if not 200 <= status < 300:  # noqa: PLR2004  # success, RFC 9110
        _object(status, body, 0.0)


def claims(token: str) -> dict[str, Any]:
    """Return what a JWT says, unverified: it came from the provider itself over TLS (OpenID Connect Core 3.1.3.7)."""
    parts = token.split(".")
    if len(parts) != 3:  # noqa: PLR2004  # header, payload, signature
        return {}
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error, msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def account_of(id_token: str) -> tuple[str, dict[str, str]]:
    """Return whose login an ID token is of, and the details of it that are no secrets."""
    found = claims(id_token)
    own = found.get(_CLAIMS)
    details = own if isinstance(own, dict) else {}
    names = ("chatgpt_account_id", "chatgpt_plan_type", "chatgpt_user_id")
    return _text(found.get("email")), {name: _text(details.get(name)) for name in names if _text(details.get(name))}


def _account(found: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Look where providers say whose login it is: an ID token, or Anthropic's `account`."""
    account, details = account_of(_token(found, "id_token"))
    own = found.get("account")
    if not account and isinstance(own, dict):
        account = _text(own.get("email_address"))
    return account, details


def _object(status: int, body: bytes, retry_after_s: float) -> dict[str, Any]:
    """Return the JSON object of an answer of success, or raise what another one means."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    if 200 <= status < 300:  # noqa: PLR2004  # success, RFC 9110
        if not isinstance(found, dict):
            raise AnswerError("later", "not-json")
        if "error" not in found:
            return found
    code = _error_code(found)
    if code in _PENDING:
        raise AnswerError(_PENDING[code], code, retry_after_s=retry_after_s)
    if code in _ENDED and status < 500:  # noqa: PLR2004  # a server in trouble ends nothing
        raise AnswerError("ended", code)
    if status in (408, 425, 429) or status >= 500:  # noqa: PLR2004  # RFC 9110
        raise AnswerError("later", code or f"status-{status}", retry_after_s=retry_after_s)
    raise AnswerError("refused", code or f"status-{status}")


def _error_code(found: object) -> str:
    """Return the code of an error answer: RFC 6749 section 5.2, or the object that some providers put there."""
    if not isinstance(found, dict):
        return ""
    error = found.get("error")
    if isinstance(error, dict):
        error = error.get("code") or error.get("type")
    return error_code(error) or error_code(found.get("code"))


def error_code(value: object) -> str:
    """Return an error code that can be shown; anything else could quote what was sent."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else ""


def _token(found: dict[str, Any], key: str) -> str:
    """Return a token that can stand in a header, or nothing where there is none.

    Raises:
        AnswerError: there is one that cannot be used.
    """
    value = found.get(key)
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not fits(value):
        raise AnswerError("refused", f"{key.replace('_', '-')}-unusable")
    return value


def fits(value: str) -> bool:
    """Return whether a token or a code can stand in a header or a form."""
    return len(value) <= _MAX_TOKEN and bool(_TOKEN.fullmatch(value))


def _seconds(value: object) -> float | None:
    """Return a length of time; some providers write numbers as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:  # noqa: PLR2004
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return None
    return float(min(value, MAX_LIFETIME_S))


def _own_lifetime(access_token: str, now: float) -> float | None:
    """Return how long an access token that is a JWT says it is good for."""
    end = claims(access_token).get("exp")
    return _seconds(end - now) if isinstance(end, int) and not isinstance(end, bool) else None


def _text(value: object) -> str:
    """Return a short text that can be shown, or nothing."""
    return str(value) if _shown(value, 256) else ""


def _shown(value: object, limit: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit and value.isprintable()
