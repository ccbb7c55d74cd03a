"""Forged tokens: everything but what the authority itself signed for this agent, run, time and party is refused.

Each case stands beside the token it was made from, which works (PEERS class 68).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.identity.authority import Demand
from cloister.identity.tokens import LEEWAY_S, MAX_LIFE_S, TokenError
from support import jws
from support.identity_bench import DEMAND, DIGEST, NOW, Bench, set_up


@pytest.fixture
def bench() -> Bench:
    """An authority whose own token works."""
    bench = set_up()
    assert bench.authority.verify(bench.token, DEMAND, NOW).run == "0123456789ab"
    return bench


def refused(bench: Bench, token: str, demand: Demand = DEMAND, now: float = NOW) -> str:
    """Return why a token is refused; afterwards the good one still works."""
    with pytest.raises(TokenError) as caught:
        bench.authority.verify(token, demand, now)
    assert token[:40] not in str(caught.value) or not token
    assert bench.authority.verify(bench.token, DEMAND, NOW)
    return caught.value.reference


NONE = ("none", "None", "NONE", "nOnE", "none ", "", "null", " none")


@pytest.mark.parametrize("name", NONE)
@pytest.mark.parametrize("tail", ["", "A" * 86])
def test_no_algorithm_at_all(bench: Bench, name: str, tail: str) -> None:
    """`alg: none` in every spelling, with an empty or an invented signature."""
    body = f"{jws.b64(json.dumps(bench.header | {'alg': name}))}.{bench.token.split('.')[1]}"

    assert refused(bench, f"{body}.{tail}") in {"token-algorithm", "token-malformed"}


@pytest.mark.parametrize("name", [None, 1, True, [], ["EdDSA"], {"alg": "EdDSA"}, "eddsa", "Ed25519", "EDDSA"])
def test_an_algorithm_that_is_not_exactly_ours(bench: Bench, name: Any) -> None:
    """Other types and spellings, signed with the right key even."""
    assert refused(bench, jws.make(bench.header | {"alg": name}, bench.claims, bench.private)) == "token-algorithm"


def test_a_header_without_algorithm(bench: Bench) -> None:
    """The algorithm is not guessed from the key."""
    header = {name: value for name, value in bench.header.items() if name != "alg"}

    assert refused(bench, jws.make(header, bench.claims, bench.private)) == "token-algorithm"


@pytest.mark.parametrize("size", ["HS256", "HS384", "HS512"])
def test_hmac_with_the_public_key(bench: Bench, size: str) -> None:
    """The public key is no shared secret, in any of its forms."""
    key = bench.authority.jwks(NOW)["keys"][0]
    raw = jws.unb64(key["x"])
    for secret in (raw, key["x"].encode(), json.dumps(key).encode(), b""):
        body = f"{jws.b64(json.dumps(bench.header | {'alg': size}))}.{bench.token.split('.')[1]}"
        mac = hmac.new(secret, body.encode(), getattr(hashlib, f"sha{size[2:]}")).digest()
        assert refused(bench, f"{body}.{jws.b64(mac)}") in {"token-algorithm", "token-malformed"}
        same = f"{bench.token.rpartition('.')[0]}.{jws.b64((mac * 2)[:64])}"
        assert refused(bench, same) == "token-signature"


@pytest.mark.parametrize("name", ["RS256", "PS256", "ES256"])
def test_other_signatures(bench: Bench, name: str) -> None:
    """RSA and ECDSA keys of the forger's own, under their own names and under ours."""
    for alg in (name, "EdDSA"):
        body = f"{jws.b64(json.dumps(bench.header | {'alg': alg}))}.{bench.token.split('.')[1]}"
        if name == "ES256":
            signature = ec.generate_private_key(ec.SECP256R1()).sign(body.encode(), ec.ECDSA(hashes.SHA256()))
        else:
            scheme = padding.PKCS1v15() if name == "RS256" else padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            signature = rsa.generate_private_key(65537, 2048).sign(body.encode(), scheme, hashes.SHA256())
        for cut in (signature, signature[:64]):
            assert refused(bench, f"{body}.{jws.b64(cut)}") in {
                "token-algorithm", "token-malformed", "token-signature",
            }  # fmt: skip


KIDS = (
    "../../../../etc/passwd", "..", "/dev/null", "\0", "a\0b", "' OR 1=1 --", "'; DROP TABLE keys; --", "${jndi:ldap://x}",
    "https://evil.example/jwks.json", "file:///etc/passwd", "k" * 43, "A" * 5000, "", " ", "\u202e", "kľúč", "|cat",
    None, 0, 1.5, True, [], {}, ["a"],
)  # fmt: skip


@pytest.mark.parametrize("kid", KIDS, ids=range(len(KIDS)))
def test_a_key_id_is_a_name_and_nothing_else(bench: Bench, kid: Any) -> None:
    """Paths, NUL, SQL, addresses, long ones, other types: no key is found by them, and nothing is opened."""
    forger = Ed25519PrivateKey.generate()

    assert refused(bench, jws.make(bench.header | {"kid": kid}, bench.claims, forger)) in {
        "token-key", "token-malformed",
    }  # fmt: skip


@pytest.mark.parametrize(
    "field", ["jwk", "jku", "x5u", "x5c", "x5t", "x5t#S256", "crit", "b64", "zip", "cty", "enc", "exp"]
)
@pytest.mark.parametrize("signed_by", ["the agent's key", "the forger's key"])
def test_headers_that_bring_a_key_or_a_rule(bench: Bench, field: str, signed_by: str) -> None:
    """Keys in the token, addresses of keys, critical extensions: refused even under a good signature."""
    forger = Ed25519PrivateKey.generate()
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": jws.b64(forger.public_key().public_bytes_raw()), "kid": "x"}
    value: Any = {"jwk": jwk, "crit": ["exp"], "b64": False, "exp": 1}.get(field, "https://evil.example/keys")
    private = bench.private if signed_by == "the agent's key" else forger
    token = jws.make(bench.header | {field: value}, bench.claims, private)

    assert refused(bench, token) == "token-header"


def test_another_type_of_token(bench: Bench) -> None:
    """`typ` other than JWT (an access token, a nested one) is no token of ours."""
    for typ in ("at+jwt", "jwt", "JWE", None, ["JWT"]):
        assert refused(bench, jws.make(bench.header | {"typ": typ}, bench.claims, bench.private)) == "token-header"


TIMES = {
    "expired": ({"exp": NOW}, "token-expired"),
    "expired long ago": ({"iat": NOW - 2000, "nbf": NOW - 2000, "exp": NOW - 1200}, "token-expired"),
    "not yet": ({"nbf": NOW + LEEWAY_S + 1}, "token-early"),
    "issued in the future": ({"iat": NOW + LEEWAY_S + 1, "exp": NOW + 600}, "token-early"),
    "lives too long": ({"exp": NOW + MAX_LIFE_S + 1}, "token-life"),
    "lives for ever": ({"exp": 2**53}, "token-life"),
    "born long ago": ({"iat": 0, "nbf": 0}, "token-life"),
    "ends before it begins": ({"iat": NOW + 20, "exp": NOW + 10}, "token-life"),
}


@pytest.mark.parametrize("case", TIMES)
def test_times(bench: Bench, case: str) -> None:
    """Each of these is signed with the right key, and still refused."""
    changes, reason = TIMES[case]

    assert refused(bench, jws.make(bench.header, bench.claims | changes, bench.private)) == reason


def test_skew_is_granted_to_the_signer_and_never_to_the_end(bench: Bench) -> None:
    """A clock that is 30 s ahead still signs good tokens; a token is dead in the second it names."""
    ahead = {"iat": NOW + LEEWAY_S, "nbf": NOW + LEEWAY_S, "exp": NOW + 600}

    assert bench.authority.verify(jws.make(bench.header, bench.claims | ahead, bench.private), DEMAND, NOW)
    assert bench.authority.verify(bench.token, DEMAND, NOW + MAX_LIFE_S - 0.001)
    with pytest.raises(TokenError, match="expired"):
        bench.authority.verify(bench.token, DEMAND, NOW + MAX_LIFE_S)


@pytest.mark.parametrize("audience", ["other", "", "Vault", "vault ", "vault/", "*", "vaul"])
def test_another_audience(bench: Bench, audience: str) -> None:
    """A token for one party proves nothing to another, nor to one that does not say who it is."""
    assert refused(bench, bench.token, Demand(audience=audience)) == "token-audience"
    assert refused(bench, jws.make(bench.header, bench.claims | {"aud": audience}, bench.private)) == "token-audience"


@pytest.mark.parametrize("audience", [["vault"], ["other", "vault"], {"vault": 1}, None, 7])
def test_audiences_that_are_no_text(bench: Bench, audience: Any) -> None:
    """A list of audiences would be a token for several parties, each of which could pass it on."""
    assert refused(bench, jws.make(bench.header, bench.claims | {"aud": audience}, bench.private)) == "token-claims"


CLAIMS = ("iss", "sub", "aud", "iat", "nbf", "exp", "jti", "agent", "run", "user", "policy")


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_is_needed_and_typed(bench: Bench, name: str) -> None:
    """A missing claim and one of another type are refused, never taken for a default."""
    without = {key: value for key, value in bench.claims.items() if key != name}

    assert refused(bench, jws.make(bench.header, without, bench.private)) == "token-claims"
    for value in (None, [], {}, True, 1.5, "1e9" if isinstance(bench.claims[name], int) else 5):
        token = jws.make(bench.header, bench.claims | {name: value}, bench.private)
        assert refused(bench, token) == "token-claims"


def test_claims_nobody_knows(bench: Bench) -> None:
    """A claim that is not ours could mean something to somebody: it never came from us."""
    for name in ("admin", "scope", "cnf", "Aud", "aud ", "__proto__"):
        token = jws.make(bench.header, bench.claims | {name: "x"}, bench.private)
        assert refused(bench, token) == "token-claims"


def test_a_claim_given_twice(bench: Bench) -> None:
    """Readers disagree about which one counts, so neither does."""
    for name, value in (("aud", "other"), ("exp", NOW + 60), ("run", "000000000000")):
        text = json.dumps(bench.claims)
        for twice in (f'{text[:-1]}, "{name}": {json.dumps(value)}}}', f'{{"{name}": {json.dumps(value)}, {text[1:]}'):
            assert refused(bench, jws.make(bench.header, twice, bench.private)) == "token-malformed"
    header = json.dumps(bench.header)
    assert (
        refused(bench, jws.make(f'{header[:-1]}, "alg": "EdDSA"}}', bench.claims, bench.private)) == "token-malformed"
    )


IDENTITIES = {
    "agent only": {"agent": "other"},
    "subject only": {"sub": "spiffe://example.org/user/alice/agent/other/run/0123456789ab"},
    "both": {"agent": "other", "sub": "spiffe://example.org/user/alice/agent/other/run/0123456789ab"},
    "run": {"run": "zzzzzzzzzzzz"},
    "user": {"user": "root"},
    "trust domain": {"sub": "spiffe://evil.example/user/alice/agent/coder/run/0123456789ab"},
    "issuer": {"iss": "spiffe://evil.example"},
    "issuer with a slash": {"iss": "spiffe://example.org/"},
    "no SPIFFE ID": {"sub": "coder"},
    "a way up": {"sub": "spiffe://example.org/user/alice/agent/../agent/coder/run/0123456789ab"},
    "more behind": {"sub": "spiffe://example.org/user/alice/agent/coder/run/0123456789ab/x"},
    "a query": {"sub": "spiffe://example.org/user/alice/agent/coder/run/0123456789ab?x"},
    "a newline": {"sub": "spiffe://example.org/user/alice/agent/coder/run/0123456789ab\n"},
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_another_identity(bench: Bench, case: str) -> None:
    """An agent's key speaks for that agent, in one trust domain, and claims do not contradict each other."""
    token = jws.make(bench.header, bench.claims | IDENTITIES[case], bench.private)

    assert refused(bench, token) in {"token-issuer", "token-agent"}


def test_the_key_of_another_agent(bench: Bench) -> None:
    """A token of `coder` signed by `other`, under either key's name."""
    state = bench.authority.state
    theirs = state.signing_key("other")
    assert theirs is not None
    private = Ed25519PrivateKey.from_private_bytes(state.seeds[theirs.kid].value)

    assert refused(bench, jws.make(bench.header, bench.claims, private)) == "token-signature"
    assert refused(bench, jws.make(bench.header | {"kid": theirs.kid}, bench.claims, private)) == "token-agent"


def test_what_a_verifier_insists_on(bench: Bench) -> None:
    """The run whose socket a token came over, its agent, and the policy in force."""
    right = Demand(audience="vault", run="0123456789ab", agent="coder", digest=DIGEST)

    assert bench.authority.verify(bench.token, right, NOW)
    assert refused(bench, bench.token, Demand(audience="vault", run="0123456789ac")) == "token-run"
    assert refused(bench, bench.token, Demand(audience="vault", agent="other")) == "token-agent"
    assert refused(bench, bench.token, Demand(audience="vault", digest="cd" * 32)) == "token-policy"


def test_shapes(bench: Bench) -> None:
    """Not three parts, other alphabets, padding, blanks, a second spelling of the same bytes, more behind it."""
    head, payload, signature = bench.token.split(".")
    last = signature[-1]
    twin = next(
        char for char in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        if char != last and jws.unb64(signature[:-1] + char) == jws.unb64(signature)
    )  # fmt: skip
    for text in (
        "", ".", "..", "a.b.c", head, f"{head}.{payload}", f"{head}.{payload}.", f"{head}..{signature}",
        f".{payload}.{signature}", f"{bench.token}.{signature}", f"{bench.token}.", f".{bench.token}",
        f"{bench.token}=", f"{head}=.{payload}.{signature}", f"{bench.token}\n", f" {bench.token}", f"{bench.token}\0",
        f"{bench.token}A", bench.token[:-1], f"{head}.{payload}.{signature[:-1]}{twin}", f"{bench.token}é",
        bench.token.replace(".", "\u2024"), bench.token.replace("e", "\u0435"), f"Bearer {bench.token}", "\ud800",
        f"{head} .{payload}.{signature}", f"{head}.{payload}+.{signature}", f"{head}.{payload}/.{signature}",
        json.dumps({"protected": head, "payload": payload, "signature": signature}),
    ):  # fmt: skip
        assert refused(bench, text) == "token-malformed", text


def test_a_token_in_a_token(bench: Bench) -> None:
    """Nested tokens are not unpacked."""
    assert refused(bench, jws.make(bench.header | {"cty": "JWT"}, bench.token, bench.private)) == "token-header"
    assert refused(bench, jws.make(bench.header, f'"{bench.token}"', bench.private)) == "token-malformed"


def test_huge_and_deep_ones(bench: Bench) -> None:
    """A megabyte is refused by its length, and nesting does not exhaust the stack."""
    assert (
        refused(bench, jws.make(bench.header, bench.claims | {"jti": "x" * (1 << 20)}, bench.private))
        == "token-malformed"
    )
    assert refused(bench, "A" * (1 << 20)) == "token-malformed"
    assert refused(bench, "." * (1 << 20)) == "token-malformed"
    assert refused(bench, jws.make(bench.header, "[" * 5000, bench.private)) == "token-malformed"
    assert refused(bench, jws.make(bench.header, '{"a":' * 1000 + "1" + "}" * 1000, bench.private)) in {
        "token-malformed", "token-claims",
    }  # fmt: skip
    assert refused(bench, jws.make(bench.header, '{"iat": ' + "9" * 5000 + "}", bench.private)) in {
        "token-malformed", "token-claims",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "1", '"x"', "{", '{"iat": NaN}', '{"iat": Infinity}', "\ufeff{}", "\0"]
)
def test_payloads_that_are_no_object(bench: Bench, text: str) -> None:
    """Signed rubbish is rubbish."""
    assert refused(bench, jws.make(bench.header, text, bench.private)) == "token-malformed"


def test_an_error_never_repeats_the_token(bench: Bench) -> None:
    """Neither message, remedy nor place of an error holds the token: errors are logged."""
    with pytest.raises(TokenError) as caught:
        bench.authority.verify(bench.token, Demand(audience="other"), NOW)

    shown = repr(vars(caught.value)) + str(caught.value)
    assert not any(part in shown for part in bench.token.split("."))
