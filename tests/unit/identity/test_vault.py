"""Keys at rest: what is sealed comes back, and nothing that was changed, swapped, cut or sealed elsewhere does."""

import base64
import json
from typing import Any

import pytest

from cloister.errors import DeniedError
from cloister.identity import state as transitions
from cloister.identity import vault
from cloister.identity.keys import Seed
from cloister.identity.state import State
from support.identity_bench import NOW

MASTER = bytes(range(32))
OTHER = bytes(range(1, 33))


@pytest.fixture
def state() -> State:
    """Two agents, one of them with a retired key, a purpose, and a revocation."""
    made = State(trust_domain="example.org", issuer="spiffe://example.org", purposes={"recordings": Seed(b"p" * 32)})
    made = transitions.with_key(transitions.with_key(made, "coder", NOW), "other", NOW)
    made = transitions.rotate(made, "coder", NOW)
    return transitions.revoke(made, "run", "0123456789ab", NOW)


def reason(document: bytes, master: bytes = MASTER) -> str:
    """Return why a document is refused."""
    with pytest.raises(DeniedError) as caught:
        vault.unseal(document, master)
    return caught.value.reference


def resealed(state: State, change: Any) -> bytes:
    """Return a document changed by somebody who knows the MAC's key but not the keys of the boxes' owners."""
    document = json.loads(vault.seal(state, MASTER))
    change(document["body"])
    body = json.dumps(document["body"]).encode()
    document["mac"] = base64.b64encode(vault._mac(MASTER, body)).decode()
    text = json.dumps({name: value for name, value in document.items() if name != "body"})
    return f'{text[:-1]}, "body": '.encode() + body + b"}"


def test_what_is_sealed_comes_back(state: State) -> None:
    """Everything, to the bit; and the bench below leaves a document that opens."""
    assert vault.unseal(vault.seal(state, MASTER), MASTER) == state
    assert vault.unseal(resealed(state, dict.copy), MASTER) == state
    assert vault.opens(vault.seal(state, MASTER), MASTER)


def test_no_private_part_stands_in_the_clear(state: State) -> None:
    """Neither raw nor as hexadecimal nor as base64."""
    document = vault.seal(state, MASTER)
    for secret in (
        *(seed.value for seed in state.seeds.values()),
        b"p" * 32,
        MASTER,
        vault.subkey(MASTER, "agent-keys"),
    ):
        assert secret not in document
        assert secret.hex().encode() not in document
        assert base64.b64encode(secret) not in document
        assert base64.urlsafe_b64encode(secret).rstrip(b"=") not in document


def test_another_master_key_opens_nothing(state: State) -> None:
    """And it is told apart from a damaged file, since the remedy is another."""
    assert reason(vault.seal(state, MASTER), OTHER) == "master-key-wrong"
    assert not vault.opens(vault.seal(state, MASTER), OTHER)


def test_every_changed_byte_is_noticed(state: State) -> None:
    """No single bit of the document can be flipped; sampled over the whole of it."""
    document = vault.seal(state, MASTER)
    for place in range(0, len(document) - 2, 3):
        changed = document[:place] + bytes([document[place] ^ 1]) + document[place + 1 :]
        try:
            found = vault.unseal(changed, MASTER)
        except DeniedError:
            continue
        assert found == state, place  # a bit that base64 does not use


def test_a_document_cut_off_is_refused(state: State) -> None:
    """At any length, the empty one included."""
    document = vault.seal(state, MASTER).rstrip()
    for length in range(0, len(document), 7):
        assert reason(document[:length]) == "key-store-damaged"


def test_keys_cannot_be_swapped(state: State) -> None:
    """A private part is bound to its agent, key id and version, even for one who can forge the MAC."""
    kids = list(state.seeds)

    def swap(body: dict[str, Any]) -> None:
        body["seeds"][kids[0]], body["seeds"][kids[1]] = body["seeds"][kids[1]], body["seeds"][kids[0]]

    def rename(body: dict[str, Any]) -> None:
        next(key for key in body["keys"] if key["kid"] == kids[0])["agent"] = "evil"

    def older(body: dict[str, Any]) -> None:
        next(key for key in body["keys"] if key["kid"] == kids[0])["version"] = 9

    def purpose(body: dict[str, Any]) -> None:
        body["purposes"]["recordings"] = body["seeds"][kids[0]]

    def other_purpose(body: dict[str, Any]) -> None:
        body["purposes"]["else"] = body["purposes"].pop("recordings")

    def orphan(body: dict[str, Any]) -> None:
        body["keys"] = []

    for change in (swap, rename, older, purpose, other_purpose, orphan):
        assert reason(resealed(state, change)) == "key-store-damaged", change.__name__


def test_revocations_and_dates_are_covered(state: State) -> None:
    """Taking a revocation out, or making a retired key sign again, needs the master key."""
    document = json.loads(vault.seal(state, MASTER))
    for name, value in (("revoked", []), ("seen", 0), ("issuer", "spiffe://evil"), ("generation", 1), ("epochs", {})):
        changed = {**document, "body": {**document["body"], name: value}}
        assert reason(json.dumps(changed).encode()) == "key-store-damaged"


def test_nonces_are_never_used_twice(state: State) -> None:
    """Sealing the same state again takes new nonces for every part."""
    found: list[str] = []
    for _ in range(20):
        body = json.loads(vault.seal(state, MASTER))["body"]
        found += [box["nonce"] for box in (*body["seeds"].values(), *body["purposes"].values())]

    assert len(found) == len(set(found)) == 20 * 3
    assert all(len(base64.b64decode(nonce)) == 12 for nonce in found)


def test_keys_for_different_purposes_have_nothing_in_common() -> None:
    """HKDF gives each purpose its own key, and the same one every time."""
    names = ("agent-keys", "purpose-keys", "document-mac", "check", "")

    assert len({vault.subkey(MASTER, name) for name in names}) == len(names)
    assert vault.subkey(MASTER, "check") == vault.subkey(MASTER, "check") != vault.subkey(OTHER, "check")
    with pytest.raises(ValueError, match="32 bytes"):
        vault.subkey(MASTER[:31], "check")


def test_a_later_format_is_not_guessed_at(state: State) -> None:
    """A document of a format we do not know is left alone, with a reason."""
    document = json.loads(vault.seal(state, MASTER)) | {"format": 2}

    assert reason(json.dumps(document).encode()) == "key-store-format"


@pytest.mark.parametrize(
    "text",
    ["", "ab", "0" * 63, "0" * 65, "g" * 64, "0x" + "0" * 62, "\u0660" * 64, "0" * 32 + " " + "0" * 31, "é" * 64],
)
def test_master_keys_are_64_hexadecimal_digits(text: str) -> None:
    """Anything else is refused rather than padded, cut or hashed."""
    assert vault.parse_master(text) is None
    assert vault.parse_master(" " + "aB" * 32 + "\n") == b"\xab" * 32
