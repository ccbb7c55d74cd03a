"""The OAuth protocol as values: what to open, what to send, and which redirect is ours.

Authorization code with PKCE S256 and state (RFC 6749, RFC 7636, loopback redirects of RFC 8252), device
codes (RFC 8628), revocation (RFC 7009). Sans-I/O: no request is sent here, and chance comes in as bytes.
What answers mean is in `oauth_answers`; what is kept of them, and when to renew it, in `logins`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from cloister.credentials.oauth_answers import AnswerError, DeviceCode, error_code, fits
from cloister.policy.login import Body, Login

CHANCE_BYTES = 64
"""Random bytes that `begin` wants: 32 for the verifier, 32 for the state."""

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class WrongStateError(Exception):
    """A redirect that does not belong to this attempt: somebody else's page made the browser ask for it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to log in: `state` binds the redirect to this process, `verifier` the exchange of the code."""

    verifier: str = field(repr=False)
    state: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """One POST to a provider."""

    url: str
    content_type: str
    body: bytes = field(repr=False)
    """It holds a code or a token."""


def begin(chance: bytes) -> Attempt:
    """Return a new attempt made from `CHANCE_BYTES` random bytes."""
    if len(chance) != CHANCE_BYTES:
        raise ValueError(f"expected {CHANCE_BYTES} bytes")
    return Attempt(_plain(chance[:32]), _plain(chance[32:]))


def challenge(verifier: str) -> str:
    """Return the S256 challenge of a verifier (RFC 7636 section 4.2)."""
    return _plain(hashlib.sha256(verifier.encode("ascii")).digest())


def authorize_url(login: Login, attempt: Attempt, redirect_uri: str) -> str:
    """Return the address to open in a browser."""
    parameters = {
        **login.authorize_parameters,
        "response_type": "code",
        "client_id": login.client_id,
        "redirect_uri": redirect_uri,
        "code_challenge": challenge(attempt.verifier),
        "code_challenge_method": "S256",
        "state": attempt.state,
    }
    if login.scopes:
        parameters["scope"] = " ".join(login.scopes)
    joint = "&" if urlsplit(login.authorize_url).query else "?"
    return f"{login.authorize_url}{joint}{urlencode(parameters)}"


def read_callback(query: str, attempt: Attempt) -> str:
    """Return the code of a redirect.

    Raises:
        WrongStateError: the redirect is not for this attempt; the right one may still come.
        AnswerError: the provider says no, or the redirect is broken.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=32, strict_parsing=True)
    except ValueError:
        raise WrongStateError from None
    found = dict(pairs)
    if len(found) != len(pairs) or not hmac.compare_digest(found.get("state", "").encode(), attempt.state.encode()):
        raise WrongStateError
    if "error" in found:
        raise AnswerError("refused", error_code(found["error"]) or "error-unreadable")
    code = found.get("code", "")
    if not fits(code):
        raise AnswerError("refused", "code-missing")
    return code


def read_pasted(text: str, attempt: Attempt) -> str:
    """Return the code that a person pasted: the address of the last page, or the `CODE#STATE` that it shows.

    Raises:
        WrongStateError: there is no state in it, or that of another attempt.
        AnswerError: as `read_callback`.
    """
    text = text.strip()
    if "://" in text:
        return read_callback(urlsplit(text).query, attempt)
    code, _, state = text.partition("#")
    return read_callback(urlencode({"code": code, "state": state}), attempt)


def exchange_request(login: Login, attempt: Attempt, redirect_uri: str, code: str) -> Request:
    """Return the request that turns a code into tokens."""
    fields = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": redirect_uri,
        "client_id": login.client_id,
        "code_verifier": attempt.verifier,
    }
    if login.state_in_exchange:
        fields["state"] = attempt.state
    return _request(login.token_url, login.exchange, fields)


def refresh_request(login: Login, refresh_token: str, scopes: tuple[str, ...]) -> Request:
    """Return the request that renews an access token."""
    fields = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": login.client_id}
    if login.scope_in_refresh and scopes:
        fields["scope"] = " ".join(scopes)
    return _request(login.token_url, login.refresh, fields)


def revoke_request(login: Login, token: str, hint: Literal["refresh_token", "access_token"]) -> Request:
    """Return the request that revokes a token (RFC 7009 section 2.1)."""
    fields = {"token": token, "token_type_hint": hint, "client_id": login.client_id}
    return _request(login.revoke_url, login.refresh, fields)


def device_request(login: Login) -> Request:
    """Return the request that begins a device flow (RFC 8628 section 3.1)."""
    fields = {"client_id": login.client_id} | ({"scope": " ".join(login.scopes)} if login.scopes else {})
    return _request(login.device_url, "form", fields)


def poll_request(login: Login, device: DeviceCode) -> Request:
    """Return the request that asks whether the person has agreed (RFC 8628 section 3.4)."""
    fields = {"grant_type": DEVICE_GRANT, "device_code": device.device_code, "client_id": login.client_id}
    return _request(login.token_url, "form", fields)


def _request(url: str, body: Body, fields: dict[str, str]) -> Request:
    if body == "json":
        return Request(url, "application/json", msgspec.json.encode(fields))
    return Request(url, "application/x-www-form-urlencoded", urlencode(fields).encode("ascii"))


def _plain(data: bytes) -> str:
    """Return base64url without padding (RFC 7636 appendix A)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
