"""Words are taken out of prompts, and nothing else is touched."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials.placeholders import Placeholders
from cloister.llm.redact import REPLACEMENT, Redactor

TOKEN = "ghp_" + "a1B2" * 9
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@pytest.mark.parametrize(("before", "after"), [
    (b'{ "a" : "x secret-1 y",\t"b":1 }', b'{ "a" : "x [redacted] y",\t"b":1 }'),
    (b'{"a":"secr\\u0065t-2\\/"}', b'{"a":"[redacted]\\/"}'),
    (b'{"a":"\\ud83d\\ude00 secret-3 \xc3\xa9"}', b'{"a":"\\ud83d\\ude00 [redacted] \xc3\xa9"}'),
    ('{"a":"é😀secret-4é"}'.encode(), '{"a":"é😀[redacted]é"}'.encode()),
    (b'{"secret-5":"k"}', b'{"secret-5":"k"}'),
    (b'{"a":["secret-6","secret-7"]}', b'{"a":["[redacted]","[redacted]"]}'),
    (b'{"a":"secret"}', b'{"a":"secret"}'),
])  # fmt: skip
def test_matches_are_replaced_and_all_else_stays(before, after):
    """In values, whatever their spelling; never in keys; every other byte is the same."""
    assert Redactor([r"secret-\d"], secrets=False).redact(before)[0] == after


def test_known_tokens_and_private_keys():
    """A token by its shape, a private key with all its lines."""
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----"
    body = json.dumps({"m": f"use {TOKEN} and {key} now", "n": "-----BEGIN PRIVATE KEY-----\nMII"}).encode()
    text, count = Redactor([], secrets=True).redact(body)
    assert json.loads(text) == {"m": "use [redacted] and [redacted] now", "n": "[redacted]"}
    assert count == 3


def test_placeholders_go_like_secrets_and_only_then():
    """What stands for a secret is taken out with secrets, of any scheme and any run; without that, it passes."""
    made = Placeholders({"github": "bearer", "my-own-2": "query", "aws": "sigv4"})
    tokens = [made[name].token for name in made.names()] + [made["aws"].key_id, "cloister-Some_Key"]
    body = json.dumps({"env": [f"A={token}\nB=1" for token in tokens], "n": "cloister-github- cloister"}).encode()
    text, count = Redactor([], secrets=True, key="cloister-Some_Key").redact(body)

    assert json.loads(text) == {"env": ["A=[redacted]\nB=1"] * 5, "n": "cloister-github- cloister"}
    assert count == 5
    assert Redactor(["B="], secrets=False, key="cloister-Some_Key").redact(body)[0] == body.replace(b"B=", REPLACEMENT)


@given(st.dictionaries(TEXT, st.lists(TEXT | st.just("xx TOP xx"), max_size=4), max_size=4), st.booleans())
def test_any_prompt_stays_json(value, ascii_only):
    """The standard reader sees the same values with the matches replaced."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    text, _ = Redactor(["TOP"], secrets=False).redact(body)
    replaced = {key: [one.replace("TOP", REPLACEMENT.decode()) for one in many] for key, many in value.items()}
    assert json.loads(text) == replaced
