"""Who issues and judges tokens: one state, the grants of runs, and a cache of what was proved.

    grant (what the policy gave a run)  ──issue──▶  token  ──verify──▶  claims

A token is never stronger than its grant: same agent and run, an audience the policy names, no
longer life, the digest of the policy it was given under. There is no way from one token to
another. Clocks come in as arguments, and where the state is kept is for `runs/`.

The cache holds claims whose signature was good, by SHA-256 of the token, for at most a minute,
together with the agent's epoch: whatever is revoked changes that, so a hit is as good as a look.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister.errors import DeniedError
from cloister.identity import tokens
from cloister.identity.principal import Principal, parse, principal
from cloister.identity.state import OVERLAP_S, STEP_S, State
from cloister.identity.tokens import MAX_LIFE_S, Claims, TokenError

OWN_AUDIENCE = "cloister"
"""What our own services ask for; every run with tokens has one for it."""
CACHE_ENTRIES = 4096
CACHE_S = 60.0


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy gave one run, fixed at its start."""

    agent: str
    run: str
    user: str
    policy: str
    """SHA-256 of the policy, in hexadecimal."""
    audiences: tuple[str, ...] = ()
    lifetime_s: int = MAX_LIFE_S
    since: float = 0.0
    """When the run began."""

    def narrowed(self, audiences: tuple[str, ...], lifetime_s: int, policy: str) -> Grant:
        """Return the grant under a policy that was loaded since: never more than it was."""
        kept = tuple(name for name in self.audiences if name in audiences)
        return msgspec.structs.replace(self, audiences=kept, lifetime_s=min(self.lifetime_s, lifetime_s), policy=policy)


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a verifier insists on. Empty means: any."""

    audience: str = OWN_AUDIENCE
    """Never empty: a token for one party proves nothing to another (RFC 7519, section 4.1.3)."""
    agent: str = ""
    run: str = ""
    """The run whose socket the token came over, so that a stolen token opens nothing."""
    digest: str = ""
    """The policy in force, to refuse tokens that were issued under another."""


class Authority:
    """Issues and verifies for one state; `update` brings the next one."""

    def __init__(self, state: State) -> None:
        """Begin with a state."""
        self._cache: OrderedDict[bytes, tuple[Claims, tuple[int, int], float]] = OrderedDict()
        self._private: dict[str, Ed25519PrivateKey] = {}
        self.update(state)

    def update(self, state: State) -> None:
        """Take the next state. What was verified stays in the cache, where its epoch is still the same."""
        self.state = state
        self._public = {key.kid: Ed25519PublicKey.from_public_bytes(key.public) for key in state.keys}
        self._keys = {key.kid: key for key in state.keys}
        self._private = {kid: private for kid, private in self._private.items() if kid in state.seeds}

    def principal(self, grant: Grant) -> Principal:
        """Return who a grant is for.

        Raises:
            UnsupportedError: a name cannot stand in a SPIFFE ID.
        """
        return principal(self.state.trust_domain, grant.user, grant.agent, grant.run)

    def issue(self, grant: Grant, audience: str, now: float, jti: str, lifetime_s: int = 0) -> str:
        """Return a token.

        Args:
            grant: what the run may have.
            audience: for whom.
            now: seconds since the epoch.
            jti: a name for this token, never used before.
            lifetime_s: shorter than the grant's where wanted; 0 is the grant's.

        Raises:
            DeniedError: the grant does not hold it, or run or agent were revoked.
            LookupError: the agent has no key that signs; `state.with_key` gives it one.
        """
        self._admit(grant, audience, lifetime_s)
        key = self.state.signing_key(grant.agent)
        if key is None:
            raise LookupError(grant.agent)
        issued = int(now)
        claims = Claims(
            iss=self.state.issuer, sub=self.principal(grant).spiffe_id, aud=audience, iat=issued, nbf=issued,
            exp=issued + (lifetime_s or grant.lifetime_s), jti=jti, agent=grant.agent, run=grant.run, user=grant.user,
            policy=grant.policy,
        )  # fmt: skip
        if key.kid not in self._private:
            self._private[key.kid] = Ed25519PrivateKey.from_private_bytes(self.state.seeds[key.kid].value)
        return tokens.sign(claims, self._private[key.kid], key.kid)

    def _admit(self, grant: Grant, audience: str, lifetime_s: int) -> None:
        if audience != OWN_AUDIENCE and audience not in grant.audiences:
            raise DeniedError(
                "audience-not-granted", f"the policy of agent {grant.agent!r} names no audience {audience!r}",
                remedy=f'[agents.{grant.agent}.identity] audiences = ["{audience}"]',
            )  # fmt: skip
        if not 0 < grant.lifetime_s <= MAX_LIFE_S or not 0 <= lifetime_s <= grant.lifetime_s:
            raise DeniedError("lifetime-not-granted", f"a token of this run lives {grant.lifetime_s} s at most")
        if self.state.is_revoked("run", grant.run):
            raise DeniedError("run-revoked", f"the run {grant.run} was revoked")
        if int(grant.since) <= self.state.revoked_at(grant.agent):
            raise DeniedError("agent-revoked", f"the agent {grant.agent!r} was revoked since the run began")

    def verify(self, token: str, demand: Demand, now: float) -> Claims:
        """Return what a token proves.

        Raises:
            TokenError: nothing; `reference` says why.
        """
        if not demand.audience:
            raise TokenError("token-audience", "nobody said for whom the token must be")
        claims = self._proved(token, now)
        tokens.judge_times(claims, now)
        if claims.aud != demand.audience:
            raise TokenError("token-audience", "the token is for somebody else")
        for what, wanted, found in (
            ("agent", demand.agent, claims.agent),
            ("run", demand.run, claims.run),
            ("policy", demand.digest, claims.policy),
        ):
            if wanted and wanted != found:
                raise TokenError(f"token-{what}", f"the token was issued for another {what}")
        return claims

    def _proved(self, token: str, now: float) -> Claims:
        """Return the claims of a token of ours that nobody revoked."""
        name = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        hit = self._cache.get(name)
        if hit is not None:
            claims, epoch, until = hit
            if epoch == self.state.epoch(claims.agent) and until - CACHE_S <= now < until:
                self._cache.move_to_end(name)
                return claims
            del self._cache[name]
        claims = tokens.read(token, self._public.get)
        self._check_names(claims, tokens.key_id(token), now)
        self._cache[name] = (claims, self.state.epoch(claims.agent), now + CACHE_S)
        if len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)
        return claims

    def _check_names(self, claims: Claims, kid: str, now: float) -> None:
        """Hold the claims against the key they were signed with, and against what was revoked."""
        key = self._keys[kid]
        named = parse(claims.sub)
        ours = Principal(self.state.trust_domain, claims.user, claims.agent, claims.run)
        if claims.iss != self.state.issuer or named != ours:
            raise TokenError("token-issuer", "the token names another issuer, or contradicts itself")
        if key.agent != claims.agent:
            raise TokenError("token-agent", "the token was signed with the key of another agent")
        if key.retired and (claims.iat > key.retired + STEP_S or now >= key.retired + OVERLAP_S):
            raise TokenError("token-key", "the token was signed by a key that is unknown or was revoked")
        if self.state.is_revoked("run", claims.run) or self.state.is_revoked("token", claims.jti):
            raise TokenError("token-revoked", "the token was revoked, or its run has ended")

    def jwks(self, now: float) -> dict[str, list[dict[str, str]]]:
        """Return the public keys that may still have tokens out, as a JWK Set (RFC 7517, section 5)."""
        return {"keys": [key.jwk() for key in self.state.keys if key.signs or now < key.retired + OVERLAP_S]}
