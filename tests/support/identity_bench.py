"""A bench for tokens: an authority with two agents, a grant, and the parts a forger works with."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.identity import state as transitions
from cloister.identity.authority import Authority, Demand, Grant
from cloister.identity.state import State
from support import jws

NOW = 1_800_000_000
DIGEST = "ab" * 32
DEMAND = Demand(audience="vault")


class Bench(NamedTuple):
    """An authority at work."""

    authority: Authority
    grant: Grant
    token: str
    private: Ed25519PrivateKey
    """The agent's own key: what a forger would give everything for."""

    @property
    def header(self) -> dict[str, Any]:
        """The good token's header."""
        return json.loads(jws.unb64(self.token.split(".")[0]))

    @property
    def claims(self) -> dict[str, Any]:
        """The good token's claims."""
        return json.loads(jws.unb64(self.token.split(".")[1]))


def set_up() -> Bench:
    """Return a bench with the agents `coder` and `other`, and a token of `coder` for `vault`."""
    state = State(trust_domain="example.org", issuer="spiffe://example.org")
    state = transitions.with_key(transitions.with_key(state, "coder", NOW), "other", NOW)
    authority = Authority(state)
    grant = grant_for("coder")
    key = state.signing_key("coder")
    assert key is not None
    private = Ed25519PrivateKey.from_private_bytes(state.seeds[key.kid].value)
    return Bench(authority, grant, authority.issue(grant, "vault", NOW, "jti-1"), private)


def grant_for(agent: str, run: str = "0123456789ab") -> Grant:
    """Return a grant of that agent."""
    return Grant(
        agent=agent, run=run, user="alice", policy=DIGEST, audiences=("vault", "https://sts.example.org"), since=NOW
    )
