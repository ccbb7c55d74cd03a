"""The login files of real products: read when a person hands a login over, written with placeholders for the agent.

Checked with Claude Code 2.1.329 and Codex 0.169.0. What is written has the right shape and ends so far in the
future that no product thinks of renewing; where a token must be a JWT, the placeholder stands in its
signature, which only the provider could check. What is known of the account (plan, account id) stays,
for products show it and send it along; it opens nothing.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec

from cloister.credentials.oauth_answers import AnswerError, Granted, account_of, claims, fits

Product = Literal["claude", "codex"]

FAR = 4102444800
"""The first of January 2100, in seconds since the epoch."""
_FAR_TEXT = "2099-12-31T00:00:00Z"
_CLAUDE = "claudeAiOauth"
_CLAIMS = "https://api.openai.com/auth"
_SHORTEST_S = 0.001
_SHOWN = 256


def read_product(product: Product, data: bytes, now: float) -> Granted:
    """Return the login that a product's own file holds.

    Args:
        product: whose file it is.
        data: its content.
        now: seconds since the epoch.

    Raises:
        AnswerError: `product-file-unreadable`, or `product-not-logged-in`.
    """
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise AnswerError("refused", "product-file-unreadable") from None
    tokens = found.get(_CLAUDE if product == "claude" else "tokens") if isinstance(found, dict) else None
    if not isinstance(tokens, dict):
        raise AnswerError("refused", "product-not-logged-in")
    granted = _claude(tokens, now) if product == "claude" else _codex(tokens, now)
    if not fits(granted.access_token) or not fits(granted.refresh_token):
        raise AnswerError("refused", "product-not-logged-in")
    return granted


def placeholder_file(product: Product, token: str, details: dict[str, str], scopes: tuple[str, ...]) -> str:
    """Return what stands in the product's file inside.

    Args:
        product: whose file it is.
        token: the placeholder of the run.
        details: what is known of the account.
        scopes: of the login.
    """
    if product == "claude":
        own: dict[str, Any] = {
            "accessToken": token,
            "refreshToken": token,
            "expiresAt": FAR * 1000,
            "scopes": list(scopes),
            "subscriptionType": details.get("subscriptionType"),
            "rateLimitTier": details.get("rateLimitTier"),
        }
        return msgspec.json.encode({_CLAUDE: own}).decode()
    account = {name: value for name, value in details.items() if name.startswith("chatgpt_")}
    payload = {"exp": FAR, "iat": 0, _CLAIMS: account}
    tokens = {
        "id_token": _unsigned(payload, token),
        "access_token": _unsigned(payload, token),
        "refresh_token": token,
        "account_id": account.get("chatgpt_account_id"),
    }
    shown = {"auth_mode": "chatgpt", "OPENAI_API_KEY": None, "tokens": tokens, "last_refresh": _FAR_TEXT}
    return msgspec.json.encode(shown).decode()


def _claude(tokens: dict[str, Any], now: float) -> Granted:
    end = tokens.get("expiresAt")
    left = end / 1000 - now if isinstance(end, int) and not isinstance(end, bool) else None
    scopes = tokens.get("scopes")
    names = tuple(name for name in scopes if isinstance(name, str)) if isinstance(scopes, list) else ()
    details = {name: value for name in ("subscriptionType", "rateLimitTier") if (value := _text(tokens.get(name)))}
    return _granted(tokens.get("accessToken"), tokens.get("refreshToken"), left, names, "", details)


def _codex(tokens: dict[str, Any], now: float) -> Granted:
    access = tokens.get("access_token")
    end = claims(access).get("exp") if isinstance(access, str) else None
    left = end - now if isinstance(end, int) and not isinstance(end, bool) else None
    id_token = tokens.get("id_token")
    account, details = account_of(id_token) if isinstance(id_token, str) else ("", {})
    if own := _text(tokens.get("account_id")):
        details = details | {"chatgpt_account_id": own}
    return _granted(access, tokens.get("refresh_token"), left, (), account, details)


def _granted(  # noqa: PLR0913  # the parts of one value
    access: object, refresh: object, left: float | None, scopes: tuple[str, ...], account: str, details: dict[str, str]
) -> Granted:
    """Put a login together; one that has run out is due at once."""
    return Granted(
        access_token=access if isinstance(access, str) else "",
        refresh_token=refresh if isinstance(refresh, str) else "",
        lifetime_s=None if left is None else max(left, _SHORTEST_S),
        scopes=scopes,
        account=account,
        details=details,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= _SHOWN and value.isprintable() else ""


def _unsigned(payload: dict[str, Any], signature: str) -> str:
    """Return something of a JWT's shape whose signature is the placeholder."""
    parts = (msgspec.json.encode({"alg": "RS256", "typ": "JWT"}), msgspec.json.encode(payload))
    encoded = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    return ".".join((*encoded, signature))
