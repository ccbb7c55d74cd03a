"""Identity against any text: no changed token verifies, and nothing but a refusal comes out of rubbish."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cloister.errors import DeniedError
from cloister.identity import vault
from cloister.identity.authority import Demand
from cloister.identity.principal import parse, principal
from cloister.identity.tokens import TokenError
from support import jws
from support.identity_bench import DEMAND, NOW, set_up

BENCH = set_up()
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def verifies(token: str) -> bool:
    """Say whether the authority takes a token; anything but a TokenError is a failure of the test."""
    try:
        BENCH.authority.verify(token, DEMAND, NOW)
    except TokenError:
        return False
    return True


@given(st.data())
@settings(max_examples=400)
def test_no_mutation_of_a_token_verifies(data: st.DataObject) -> None:
    """Characters replaced, put in, taken out, parts exchanged: whatever differs from the token is refused."""
    token = BENCH.token
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(token)))
        kind = data.draw(st.sampled_from(("replace", "insert", "delete", "double", "cut")))
        text = data.draw(st.text(st.sampled_from(ALPHABET) | st.characters(), min_size=1, max_size=4))
        token = {
            "replace": token[:place] + text + token[place + len(text) :],
            "insert": token[:place] + text + token[place:],
            "delete": token[:place] + token[place + 1 :],
            "double": token[:place] + token[place:] * 2,
            "cut": token[:place],
        }[kind]

    assert verifies(token) == (token == BENCH.token)
    assert verifies(BENCH.token)


@given(st.text() | st.text(ALPHABET) | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text_is_refused_as_a_token(text: str) -> None:
    """Nothing but a refusal comes out, whatever goes in."""
    assert not verifies(text)
    assert not verifies(".".join(jws.b64(part.encode("utf-8", "surrogatepass")) for part in text.partition(".")))


@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "jwk", "crit", "b64"]), JSON))
def test_no_other_header_verifies(header: dict[str, Any]) -> None:
    """Signed by the right key, under any header that is not exactly the one of our tokens."""
    token = jws.make(header, BENCH.claims, BENCH.private)

    assert verifies(token) == (header == BENCH.header)


@given(st.dictionaries(st.sampled_from([*BENCH.claims, "x"]), JSON, min_size=1))
def test_claims_change_what_a_token_proves_or_nothing(changes: dict[str, Any]) -> None:
    """Whatever claims stand under a good signature: what verifies is this agent, this domain, this audience."""
    claims = BENCH.claims | changes
    token = jws.make(BENCH.header, json.dumps(claims, allow_nan=True), BENCH.private)
    try:
        proved = BENCH.authority.verify(token, DEMAND, NOW)
    except TokenError:
        return

    assert (proved.agent, proved.aud, proved.iss) == ("coder", "vault", "spiffe://example.org")
    assert proved.sub == f"spiffe://example.org/user/{proved.user}/agent/coder/run/{proved.run}"
    assert proved.exp - proved.iat <= 900


@given(st.text(max_size=300), st.text(max_size=60))
def test_demands_are_met_exactly(audience: str, run: str) -> None:
    """No audience or run but the token's own satisfies a verifier."""
    try:
        BENCH.authority.verify(BENCH.token, Demand(audience=audience, run=run), NOW)
    except TokenError:
        return

    assert audience == "vault"
    assert run in {"", "0123456789ab"}


@given(st.binary(max_size=400) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_as_a_key_store(document: bytes) -> None:
    """Rubbish in the file is one clear error."""
    with pytest.raises(DeniedError, match="key store"):
        vault.unseal(document, bytes(32))


@given(st.text(max_size=200))
def test_what_is_read_as_a_spiffe_id_is_written_the_same(text: str) -> None:
    """Two texts never name one principal."""
    for candidate in (text, f"spiffe://{text}", f"spiffe://example.org/user/{text}/agent/a/run/r"):
        found = parse(candidate)
        assert found is None or found.spiffe_id == candidate
        assert found is None or principal(*found) == found
