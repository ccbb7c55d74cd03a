"""What the identity service answers: one function per route, values in, values out. Sockets are in `identity`.

    GET  /healthz                  anybody          is the key store open?
    GET  /.well-known/jwks.json    anybody          public keys (RFC 7517)
    POST /v1/verify                anybody          what a token proves
    POST /v1/tokens                callers only     a token of a living run
    POST /v1/revoke                callers only     a run, an agent or a key
    POST /v1/keys/rotate           callers only     new keys

A caller is a process of the same user on the Unix socket, by the kernel's word, or one that
shows the admin token. What a token may say is not the caller's to choose: agent, policy digest,
audiences and life come from the plan of a run that is alive, and from the policy as it is now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from cloister.errors import CloisterError, DeniedError, RetryError, UsageError
from cloister.identity.authority import OWN_AUDIENCE, Demand, Grant
from cloister.identity.state import Revocable
from cloister.identity.tokens import TokenError
from cloister.runs.identity_store import IdentityStore

MAX_BODY = 64 * 1024
_T = TypeVar("_T")


class Answer(NamedTuple):
    """Status and JSON body of a response."""

    status: int
    body: Any


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's body."""


class TokenRequest(_Table, frozen=True):
    """`POST /v1/tokens`."""

    run: str
    agent: str = ""
    """Refused when it is not the run's."""
    audience: str = OWN_AUDIENCE
    lifetime_s: int = 0
    """0 for what the policy says; never more than that."""


class VerifyRequest(_Table, frozen=True):
    """`POST /v1/verify`."""

    token: str
    audience: str = OWN_AUDIENCE
    agent: str = ""
    run: str = ""
    require_digest: str = ""


class RevokeRequest(_Table, frozen=True):
    """`POST /v1/revoke`."""

    kind: Literal["run", "agent", "key"]
    id: str


class RotateRequest(_Table, frozen=True):
    """`POST /v1/keys/rotate`."""

    agent: str = ""
    """Empty for every agent that has a key."""


class Api:
    """The routes over one key store. Its methods may wait for files: call them off the event loop."""

    def __init__(self, store: IdentityStore, grant: Callable[[str], Grant | None]) -> None:
        """Take the store, and what tells the grant of a living run (None when there is no such run)."""
        self._store = store
        self._grant = grant

    def answer(self, method: str, path: str, body: bytes, *, caller: bool) -> Answer:
        """Return the response to one request; every error is a response as well."""
        route = _ROUTES.get(path)
        if route is None:
            return _error(404, "route-unknown", "there is no such route")
        if method != route.method:
            return _error(405, "method-unknown", f"this route takes {route.method}")
        if route.callers_only and not caller:
            return _error(
                403, "caller-unknown", "this route is for the Unix socket's owner and for the admin token's bearer"
            )
        try:
            return route.serve(self, body)
        except UsageError as error:
            return _error(400, error.reference, error.message)
        except DeniedError as error:
            # A store that cannot be opened is ours to mend, not the caller's.
            ours = error.reference.startswith(("master-key", "key-store"))
            return _error(503 if ours else 403, error.reference, error.message)
        except RetryError as error:
            return _error(503, error.reference, error.message)
        except CloisterError as error:
            return _error(500, error.reference, error.message)

    def health(self, _body: bytes) -> Answer:
        """Say whether keys can be used."""
        keys = len(self._store.read().keys) if self._store.exists() else 0
        return Answer(200, {"status": "ok", "keys": keys})

    def jwks(self, _body: bytes) -> Answer:
        """Return the public keys."""
        return Answer(200, self._store.jwks() if self._store.exists() else {"keys": []})

    def verify(self, body: bytes) -> Answer:
        """Return the claims of a good token, and why another one is not."""
        asked = _read(body, VerifyRequest)
        demand = Demand(audience=asked.audience, agent=asked.agent, run=asked.run, digest=asked.require_digest)
        try:
            claims = self._store.verify(asked.token, demand)
        except TokenError as error:
            return Answer(200, {"valid": False, "reason": error.reference, "message": error.message})
        return Answer(200, {"valid": True, "claims": claims})

    def issue(self, body: bytes) -> Answer:
        """Return a token of a living run."""
        asked = _read(body, TokenRequest)
        grant = self._grant(asked.run)
        if grant is None or asked.agent not in ("", grant.agent):
            raise DeniedError("run-without-tokens", "no living run of that agent has tokens by its policy")
        token, jti = self._store.issue(grant, asked.audience, lifetime_s=asked.lifetime_s)
        return Answer(201, {"token": token, "jti": jti, "expires_in": asked.lifetime_s or grant.lifetime_s})

    def revoke(self, body: bytes) -> Answer:
        """Revoke a run, an agent or a key."""
        asked = _read(body, RevokeRequest)
        revoke(self._store, asked.kind, asked.id)
        return Answer(200, {"revoked": asked.id, "kind": asked.kind})

    def rotate(self, body: bytes) -> Answer:
        """Give agents new keys."""
        return Answer(200, {"rotated": self._store.rotate(_read(body, RotateRequest).agent)})


def revoke(store: IdentityStore, kind: Revocable, name: str) -> None:
    """Revoke by kind, as a person asks for it.

    Raises:
        UsageError: no such key, no name, or no kind that people revoke.
    """
    if not name or len(name) > 128 or not name.isprintable():  # noqa: PLR2004  # longer than any name of ours
        raise UsageError("name-invalid", "that is not the name of a run, an agent or a key")
    match kind:
        case "run":
            store.revoke_run(name)
        case "agent":
            store.revoke_agent(name)
            # Times are whole seconds: what begins after this returns is never taken for what began before.
            time.sleep(1 - time.time() % 1)
        case "key":
            store.revoke_key(name)
        case _:
            raise UsageError("kind-unknown", f"a {kind} is not revoked by hand")


class _Route(NamedTuple):
    method: str
    serve: Callable[[Api, bytes], Answer]
    callers_only: bool = False


_ROUTES = {
    "/healthz": _Route("GET", Api.health),
    "/.well-known/jwks.json": _Route("GET", Api.jwks),
    "/v1/verify": _Route("POST", Api.verify),
    "/v1/tokens": _Route("POST", Api.issue, callers_only=True),
    "/v1/revoke": _Route("POST", Api.revoke, callers_only=True),
    "/v1/keys/rotate": _Route("POST", Api.rotate, callers_only=True),
}


def _read(body: bytes, kind: type[_T]) -> _T:
    """Read a body; what it holds is never repeated in an error, since it may be a token.

    Raises:
        UsageError: it is no JSON object of this kind.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise UsageError("body-invalid", "the body is not the JSON object that this route takes") from None


def _error(status: int, reference: str, message: str) -> Answer:
    return Answer(status, {"error": {"reference": reference, "message": message}})
