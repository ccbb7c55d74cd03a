"""The token itself: an Ed25519-signed JWT of one exact shape, written and read strictly.

    header   {"alg": "EdDSA", "kid": KID, "typ": "JWT"}          nothing else, in any order
    claims   iss sub aud iat nbf exp jti agent run user policy    all of them, and nothing else

Whatever a JWT may hold beyond that (`jku`, `jwk`, `x5u`, `crit`, `zip`, several audiences,
a claim given twice) is refused, since no token of ours has it: what cannot be said cannot be
misread. Signatures are checked by PyJWT with the algorithm pinned. Which key a `kid` names, and
what is revoked, is for `authority`.

Times. A token is dead at `exp`, to the second. A signer's clock may be ahead of ours by
`LEEWAY_S`. Lives of more than 15 minutes are refused even when signed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister.errors import DeniedError
from cloister.identity.keys import decode64

ALGORITHM = "EdDSA"
MAX_LIFE_S = 900
"""15 minutes."""
LEEWAY_S = 30
"""By how much a signer's clock may be ahead."""
MAX_BYTES = 8192
_SHAPE = re.compile(r"[A-Za-z0-9_-]{2,600}\.[A-Za-z0-9_-]{2,7400}\.[A-Za-z0-9_-]{86}", re.ASCII)
_KID = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_HEADER = frozenset({"alg", "kid", "typ"})
_JWS = jwt.PyJWS(algorithms=[ALGORITHM])


class TokenError(DeniedError):
    """A token that proves nothing. `reference` says why; the token itself is never part of the text."""

    def __init__(self, reference: str, message: str) -> None:
        """Keep the reason."""
        super().__init__(reference, message)


class Claims(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token says (RFC 7519, section 4.1, and four of our own). Times are whole seconds since the epoch."""

    iss: str
    sub: str
    """The SPIFFE ID of the run."""
    aud: str
    iat: int
    nbf: int
    exp: int
    jti: str
    agent: str
    run: str
    """What binds the token: it is void when this run ends, and a service may ask that its caller *is* this run."""
    user: str
    policy: str
    """SHA-256 of the policy it was issued under, in hexadecimal."""


def sign(claims: Claims, private: Ed25519PrivateKey, kid: str) -> str:
    """Return the token."""
    return _JWS.encode(msgspec.json.encode(claims), private, algorithm=ALGORITHM, headers={"kid": kid})


def key_id(token: str) -> str:
    """Return the `kid` of a token that has our shape. Nothing is proved by it yet.

    Raises:
        TokenError: it cannot be one of ours.
    """
    if len(token) > MAX_BYTES or not _SHAPE.fullmatch(token):
        raise TokenError("token-malformed", "this is no token of ours: three parts of base64url, at most 8 KiB")
    parts = token.split(".")
    raw = [decode64(part) for part in parts]
    if raw[0] is None or raw[1] is None or raw[2] is None:
        raise TokenError("token-malformed", "a part of the token is no base64url")
    header = _object(raw[0])
    if header.get("alg") != ALGORITHM:
        raise TokenError("token-algorithm", "the token is not signed with EdDSA")
    if set(header) != _HEADER or header["typ"] != "JWT":
        raise TokenError("token-header", "the token's header has fields that ours never have")
    kid = header["kid"]
    if not isinstance(kid, str) or not _KID.fullmatch(kid):
        raise TokenError("token-key", "the token names no key of ours")
    return kid


def read(token: str, find: Callable[[str], Ed25519PublicKey | None]) -> Claims:
    """Return the claims of a token whose signature is good; times and audience are still to be judged.

    Args:
        token: any text.
        find: returns the public key that a `kid` names, or None.

    Raises:
        TokenError: shape, key or signature is wrong.
    """
    public = find(key_id(token))
    if public is None:
        raise TokenError("token-key", "the token was signed by a key that is unknown or was revoked")
    try:
        payload: bytes = _JWS.decode(token, public, algorithms=[ALGORITHM])
    except jwt.InvalidTokenError:
        raise TokenError("token-signature", "the token's signature is wrong") from None
    try:
        return msgspec.convert(_object(payload), Claims, strict=True)
    except msgspec.ValidationError:
        raise TokenError("token-claims", "the token's claims are not those of ours") from None


def judge_times(claims: Claims, now: float) -> None:
    """Refuse a token outside its time.

    Raises:
        TokenError: expired, not valid yet, issued in the future, or living longer than tokens may.
    """
    if now >= claims.exp:
        raise TokenError("token-expired", "the token has expired")
    if claims.nbf > now + LEEWAY_S:
        raise TokenError("token-early", "the token is not valid yet")
    if claims.iat > now + LEEWAY_S:
        raise TokenError("token-early", "the token was issued in the future")
    if not 0 < claims.exp - claims.iat <= MAX_LIFE_S:
        raise TokenError("token-life", "the token lives longer than 15 minutes")


def _object(text: bytes) -> dict[str, Any]:
    """Read a JSON object in which no name stands twice (RFC 7515, section 4, leaves that to the reader).

    Raises:
        TokenError: it is something else.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_never)
    except (ValueError, RecursionError):
        raise TokenError("token-malformed", "a part of the token is no JSON object, or says a thing twice") from None
    if not isinstance(found, dict):
        raise TokenError("token-malformed", "a part of the token is no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _never(_text: str) -> NoReturn:
    raise ValueError("NaN and Infinity are no JSON")
