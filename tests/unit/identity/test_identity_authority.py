"""The authority: what a grant allows, keys that change and go, revocation that is instant, clocks that are set."""

import dataclasses
import json

import msgspec
import pytest

from cloister.errors import DeniedError, UnsupportedError
from cloister.identity import authority as module
from cloister.identity import state as transitions
from cloister.identity.authority import OWN_AUDIENCE, Authority, Demand, Grant
from cloister.identity.keys import make_key, thumbprint
from cloister.identity.principal import parse, user_segment
from cloister.identity.state import KEY_LIFE_S, OVERLAP_S, STEP_S, Revoked
from cloister.identity.tokens import MAX_LIFE_S, TokenError
from support import jws
from support.identity_bench import DEMAND, DIGEST, NOW, Bench, grant_for, set_up


@pytest.fixture
def bench() -> Bench:
    """An authority and a token that works."""
    return set_up()


def reason(authority: Authority, token: str, now: float = NOW, demand: Demand = DEMAND) -> str:
    """Return why a token is refused, or nothing."""
    try:
        authority.verify(token, demand, now)
    except TokenError as error:
        return error.reference
    return ""


def test_a_token_says_who_for_whom_and_under_which_policy(bench: Bench) -> None:
    """Its claims as a verifier elsewhere reads them, with the public key from the JWKS and no code of ours."""
    jwks = json.loads(json.dumps(bench.authority.jwks(NOW)))
    claims = jws.read_by_jwks(bench.token, jwks)

    assert claims == {
        "iss": "spiffe://example.org", "sub": "spiffe://example.org/user/alice/agent/coder/run/0123456789ab",
        "aud": "vault", "iat": NOW, "nbf": NOW, "exp": NOW + MAX_LIFE_S, "jti": "jti-1", "agent": "coder",
        "run": "0123456789ab", "user": "alice", "policy": DIGEST,
    }  # fmt: skip
    assert all(set(key) == {"kty", "crv", "x", "kid", "use", "alg"} for key in jwks["keys"])


def test_a_key_is_named_by_its_thumbprint() -> None:
    """RFC 8037, appendix A.3, has a key and its thumbprint."""
    public = jws.unb64("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")

    assert thumbprint(public) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_no_text_shows_a_private_key(bench: Bench) -> None:
    """`repr` of keys, state and grants holds no private part."""
    state = bench.authority.state
    secrets = [seed.value for seed in state.seeds.values()]
    shown = repr(state) + repr(make_key("a", NOW, 1)) + str(state.seeds) + f"{bench.grant}"

    assert secrets
    for secret in secrets:
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
        assert jws.b64(secret) not in shown


# --- grants -----------------------------------------------------------------------------------


def test_a_grant_is_all_there_is(bench: Bench) -> None:
    """Audiences of the policy and our own work; others, longer lives and odd ones do not."""
    issue = bench.authority.issue
    for audience in (OWN_AUDIENCE, "vault", "https://sts.example.org"):
        assert not reason(bench.authority, issue(bench.grant, audience, NOW, "j"), demand=Demand(audience=audience))
    short = issue(bench.grant, "vault", NOW, "j", 60)
    assert reason(bench.authority, short, NOW + 60) == "token-expired"
    for audience in ("other", "", "vault/", "VAULT", "*"):
        with pytest.raises(DeniedError, match="names no audience"):
            issue(bench.grant, audience, NOW, "j")
    for life in (MAX_LIFE_S + 1, -1):
        with pytest.raises(DeniedError, match="lives"):
            issue(bench.grant, "vault", NOW, "j", life)
    with pytest.raises(DeniedError, match="lives"):
        issue(msgspec.structs.replace(bench.grant, lifetime_s=3600), "vault", NOW, "j")


def test_a_reloaded_policy_can_only_take_away(bench: Bench) -> None:
    """Narrowing keeps what both policies name, the shorter life, and the new digest."""
    grant = msgspec.structs.replace(bench.grant, lifetime_s=300)
    narrowed = grant.narrowed(("vault", "new"), 900, "cd" * 32)

    assert (narrowed.audiences, narrowed.lifetime_s, narrowed.policy) == (("vault",), 300, "cd" * 32)
    assert grant.narrowed((), 60, "x").audiences == ()
    assert grant.narrowed(("vault",), 60, "x").lifetime_s == 60


def test_tokens_of_an_older_policy_are_refused_on_demand(bench: Bench) -> None:
    """`require_digest` with the policy in force refuses what was issued before the reload."""
    new = bench.authority.issue(bench.grant.narrowed(("vault",), 900, "cd" * 32), "vault", NOW, "j2")
    demand = Demand(audience="vault", digest="cd" * 32)

    assert reason(bench.authority, bench.token, demand=demand) == "token-policy"
    assert not reason(bench.authority, new, demand=demand)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "é", "a" * 129, "a\n", "a%2fb", "a?b"])
def test_names_that_have_no_place_in_a_spiffe_id_are_refused(bench: Bench, name: str) -> None:
    """Nothing is rewritten: two agents must not come out as one."""
    for field in ("agent", "run", "user"):
        grant = msgspec.structs.replace(bench.grant, **{field: name})
        with pytest.raises(UnsupportedError, match="SPIFFE"):
            bench.authority.principal(grant)
    assert parse(f"spiffe://example.org/user/u/agent/{name}/run/r") is None


def test_users_that_cannot_be_written_are_numbers() -> None:
    """A name of a directory service becomes its uid, and nobody can be taken for that."""
    assert user_segment("alice", 1000) == "alice"
    assert user_segment("CORP\\alice", 1001) == "uid-1001"
    assert user_segment("uid-1001", 1002) == "uid-1002"
    assert user_segment("", 7) == "uid-7"


# --- rotation ---------------------------------------------------------------------------------


def test_a_retired_key_counts_until_its_last_token_has_expired(bench: Bench) -> None:
    """After a rotation old tokens verify, the JWKS has both keys, and new tokens have the new key."""
    authority = bench.authority
    old = authority.state.signing_key("coder")
    assert old is not None
    authority.update(transitions.rotate(authority.state, "coder", NOW + 10))
    new = authority.state.signing_key("coder")
    assert new is not None
    token = authority.issue(bench.grant, "vault", NOW + 11, "j2")

    assert new.kid != old.kid
    assert new.version == old.version + 1
    assert not reason(authority, bench.token, NOW + 11)
    assert not reason(authority, token, NOW + 11)
    kids = {key["kid"] for key in authority.jwks(NOW + 10 + OVERLAP_S - 1)["keys"]}
    assert {old.kid, new.kid} <= kids
    assert old.kid not in {key["kid"] for key in authority.jwks(NOW + 10 + OVERLAP_S)["keys"]}


def test_a_retired_key_signs_nothing_more(bench: Bench) -> None:
    """Its private part is gone, and a token it signed after its retirement is refused."""
    authority = bench.authority
    old = authority.state.signing_key("coder")
    assert old is not None
    authority.update(transitions.rotate(authority.state, "coder", NOW + 10))
    after = NOW + 11 + STEP_S  # a clock that is put right by less is borne
    late = jws.make(bench.header, bench.claims | {"iat": after, "nbf": after}, bench.private)

    assert old.kid not in authority.state.seeds
    assert reason(authority, late, after) == "token-key"


def test_retired_keys_are_forgotten_in_the_end(bench: Bench) -> None:
    """Nothing piles up: the next change after the overlap drops the key and revocations that cannot matter."""
    state = transitions.rotate(bench.authority.state, "coder", NOW)
    state = transitions.revoke(state, "run", "r", NOW, agent="coder")
    later = transitions.rotate(state, "other", NOW + OVERLAP_S)

    assert len(state.keys) == 3
    assert sorted(key.agent for key in later.keys) == ["coder", "other", "other"]
    assert not later.revoked


def test_old_keys_are_replaced_by_themselves(bench: Bench) -> None:
    """A key of 30 days signs no more; a younger one stays."""
    state = bench.authority.state

    assert transitions.with_key(state, "coder", NOW + KEY_LIFE_S - 1) is state
    assert transitions.with_key(state, "coder", NOW + KEY_LIFE_S).signing_key("coder") != state.signing_key("coder")


# --- revocation -------------------------------------------------------------------------------


def test_a_revoked_run_is_void_at_once_and_through_the_cache(bench: Bench) -> None:
    """The token was verified a moment before; another run of the same agent goes on."""
    authority = bench.authority
    other = authority.issue(grant_for("coder", "zzzzzzzzzzzz"), "vault", NOW, "j2")
    assert not reason(authority, bench.token)
    assert not reason(authority, other)
    authority.update(transitions.revoke(authority.state, "run", "0123456789ab", NOW, agent="coder"))

    assert reason(authority, bench.token) == "token-revoked"
    assert not reason(authority, other)
    with pytest.raises(DeniedError, match="was revoked"):
        authority.issue(bench.grant, "vault", NOW, "j3")


def test_a_run_is_revoked_without_knowing_its_agent(bench: Bench) -> None:
    """A person has the id only; the cache of every agent is looked through anew."""
    assert not reason(bench.authority, bench.token)
    bench.authority.update(transitions.revoke(bench.authority.state, "run", "0123456789ab", NOW))

    assert reason(bench.authority, bench.token) == "token-revoked"


def test_a_revoked_agent_loses_keys_tokens_and_living_runs(bench: Bench) -> None:
    """Runs that began before get nothing more; a later run gets a new key; other agents are untouched."""
    authority = bench.authority
    others = authority.issue(grant_for("other"), "vault", NOW, "j2")
    assert not reason(authority, bench.token)
    state = transitions.revoke(authority.state, "agent", "coder", NOW + 5)
    authority.update(transitions.with_key(state, "coder", NOW + 6))
    later = msgspec.structs.replace(grant_for("coder", "later0000000"), since=NOW + 6.5)

    assert reason(authority, bench.token) == "token-key"
    assert not reason(authority, others)
    with pytest.raises(DeniedError, match="revoked since the run began"):
        authority.issue(bench.grant, "vault", NOW + 6, "j3")
    assert not reason(authority, authority.issue(later, "vault", NOW + 7, "j4"), NOW + 7)


def test_a_revoked_key_takes_its_tokens_with_it_and_no_others(bench: Bench) -> None:
    """The agent gets another key; its running runs go on with that."""
    authority = bench.authority
    old = authority.state.signing_key("coder")
    assert old is not None
    assert not reason(authority, bench.token)
    state = transitions.revoke(authority.state, "key", old.kid, NOW)
    authority.update(transitions.with_key(state, "coder", NOW))

    assert reason(authority, bench.token) == "token-key"
    assert old.kid not in {key["kid"] for key in authority.jwks(NOW)["keys"]}
    assert not reason(authority, authority.issue(bench.grant, "vault", NOW, "j2"))


def test_a_single_token_can_be_void(bench: Bench) -> None:
    """What an audience had, when the policy takes that audience away."""
    twin = bench.authority.issue(bench.grant, "vault", NOW, "jti-2")
    assert not reason(bench.authority, bench.token)
    bench.authority.update(transitions.revoke(bench.authority.state, "token", "jti-1", NOW, agent="coder"))

    assert reason(bench.authority, bench.token) == "token-revoked"
    assert not reason(bench.authority, twin)


@pytest.mark.parametrize("back", [0, STEP_S])
def test_a_revocation_is_kept_as_long_as_it_can_matter(bench: Bench, back: int) -> None:
    """Later changes drop it only when the token has expired, also where the clock was put back a little meanwhile."""
    authority = bench.authority
    for kind, name in (("run", "0123456789ab"), ("token", "jti-1")):
        state = transitions.revoke(authority.state, kind, name, NOW - back, agent="coder")
        for now in range(NOW, NOW + MAX_LIFE_S + 1, 100):
            state = transitions.rotate(state, "other", now)
            later = Authority(state)
            assert reason(later, bench.token, min(now, NOW + MAX_LIFE_S - 1)) == "token-revoked"
        gone = transitions.rotate(state, "other", NOW + OVERLAP_S)
        assert not gone.revoked, "and it is not kept for ever"


def test_an_agents_revocation_is_kept_for_good(bench: Bench) -> None:
    """A run may live for weeks; that its agent was revoked must not be forgotten before it ends."""
    state = transitions.revoke(bench.authority.state, "agent", "coder", NOW)
    state = transitions.rotate(state, "other", NOW + 10**8)

    assert state.revoked == (Revoked(kind="agent", id="coder", at=NOW, until=0),)


# --- cache and clocks -------------------------------------------------------------------------


def test_the_cache_is_bounded_in_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest entry goes, and is simply verified again; rubbish never enters."""
    monkeypatch.setattr(module, "CACHE_ENTRIES", 8)
    tokens = [bench.authority.issue(bench.grant, "vault", NOW, f"j{number}") for number in range(20)]
    for token in tokens:
        assert not reason(bench.authority, token)
        assert reason(bench.authority, token + "A") == "token-malformed"

    assert len(bench.authority._cache) == 8
    assert not reason(bench.authority, tokens[0])


def test_a_cached_token_still_expires_and_still_has_one_audience(bench: Bench) -> None:
    """The cache holds what a token says, never that it was accepted."""
    assert not reason(bench.authority, bench.token, NOW + MAX_LIFE_S - 1)
    assert reason(bench.authority, bench.token, NOW + MAX_LIFE_S) == "token-expired"
    assert reason(bench.authority, bench.token, demand=Demand(audience="other")) == "token-audience"


def test_a_clock_set_back_brings_nothing_back(bench: Bench) -> None:
    """Tokens that had expired by the old clock stay void when the new one says that they are young."""
    authority = bench.authority
    authority.update(transitions.revoke(authority.state, "agent", "other", NOW))
    authority.update(transitions.clock_set_back(authority.state, NOW - 5000))
    grant = msgspec.structs.replace(bench.grant, since=NOW - 5000)
    authority.update(transitions.with_key(authority.state, "coder", NOW - 5000))

    assert reason(authority, bench.token, NOW) == "token-key"
    assert reason(authority, bench.token, NOW - 5000) == "token-key"
    new = authority.issue(grant, "vault", NOW - 5000, "j")
    assert not reason(authority, new, NOW - 5000)
    assert authority.state.seen == NOW - 5000
    assert authority.state.revoked_at("other") == NOW - 5000, "or later runs of it would wait for the old time"


def test_grants_are_values(bench: Bench) -> None:
    """Nobody who was handed a grant can change it."""
    with pytest.raises((AttributeError, TypeError, dataclasses.FrozenInstanceError)):
        bench.grant.run = "other"  # type: ignore[misc]
    assert isinstance(bench.grant, Grant)
