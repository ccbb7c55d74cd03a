"""Any request: a secret stands at its place once or not at all, and never in a request to another host."""

from __future__ import annotations

import base64
from urllib.parse import quote, unquote

from hypothesis import given
from hypothesis import strategies as st

from cloister.egress.decision import Target
from cloister.egress.hosts import parse_host
from cloister.policy.model import Credential, Injection
from cloister.relay.session import RefusedError, Swap
from cloister.runs.authority import Trusted
from cloister.runs.credentials import RunCredentials

SECRETS = {"a": b"secret-of-a", "b": b"secret-of-b", "c": b"secret-of-c", "d": b"12:secret-of-d"}
HOST = "api.example.org"


class Reader:
    """Gives the secret that a reference names."""

    async def read(self, reference: str) -> bytes:
        """Return it."""
        return SECRETS[reference.partition(":")[2]]


def held() -> RunCredentials:
    """Return a run with three credentials at one host: a field, a field put in by itself, and a parameter."""
    named = {
        "a": Credential(secret="pass:a", env="A", inject=Injection(host=HOST, scheme="bearer", methods=("GET",))),
        "b": Credential(secret="pass:b", inject=Injection(host=HOST, scheme="header", header="X-Key")),
        "c": Credential(secret="pass:c", env="C", inject=Injection(host=HOST, scheme="query", query="key")),
        "d": Credential(secret="pass:d", env="D", inject=Injection(host=HOST, scheme="path", value="bot{secret}")),
    }
    return RunCredentials(named, Reader(), Trusted(None, b""))  # type: ignore[arg-type]


RUN = held()
TOKENS = [RUN.placeholders[name].token for name in sorted(SECRETS)]
WORDS = st.sampled_from(
    [*TOKENS, *(base64.b64encode(f"u:{token}".encode()).decode() for token in TOKENS), *map(quote, TOKENS),
     "Basic ", "Bearer ", "key", "key=", "&", "=", "?", "%63", "x", "/", "{secret}", "own"]
)  # fmt: skip
TEXTS = st.lists(WORDS, max_size=5).map("".join)
FIELDS = st.tuples(
    st.sampled_from([b"authorization", b"Authorization", b"x-key", b"X-Key", b"x-other"]), TEXTS.map(str.encode)
)


def swapped(method: str, host: str, path: str, headers: list[tuple[bytes, bytes]]) -> Swap | None:
    """Return what leaves, or None when it is refused."""
    target = Target("https", parse_host(host), 443, method, path)
    job = RUN.swap(target, [(b"host", host.encode()), *headers])
    try:
        job.send(None)
    except StopIteration as done:
        result: Swap = done.value
        return result
    except RefusedError:
        return None
    raise AssertionError("it waited")


@given(st.sampled_from(["GET", "POST", "TRACE"]), st.lists(FIELDS, max_size=4), TEXTS)
def test_a_secret_stands_at_its_place_or_nowhere(method: str, headers: list[tuple[bytes, bytes]], query: str) -> None:
    """Once in its own field or parameter when it is named as used, else in no part of the request."""
    done = swapped(method, HOST, f"/x?{query}", headers)
    if done is None:
        return
    place = {"a": b"authorization", "b": b"x-key"}
    for name, secret in SECRETS.items():
        inside = [key.lower() for key, value in done.headers if secret in value]
        expected = [place[name]] if name in done.used and name in place else []
        assert inside == expected
        assert done.path.count(secret.decode()) == (name == "c" and name in done.used)
    assert method != "TRACE" or not done.used
    assert method == "GET" or "a" not in done.used


@given(st.lists(st.sampled_from([*TOKENS, "bot", "/", "%2F", "%62ot", "x", "..", "?", ":"]), max_size=8).map("".join))
def test_a_secret_of_the_path_stands_in_segments_that_are_its_own(path: str) -> None:
    """As many segments as before, those of the form replaced, the others byte for byte as they came."""
    done = swapped("POST", HOST, f"/{path}", [])
    if done is None:
        return
    before, after = (text.partition("?") for text in (f"/{path}", done.path))
    token, secret = RUN.placeholders["d"].token, SECRETS["d"].decode()
    assert before[2] == after[2]
    for was, now in zip(before[0].split("/"), after[0].split("/"), strict=True):
        ours = unquote(was) == f"bot{token}"
        assert now == (f"bot{secret}" if ours else was)


@given(st.sampled_from(["b.example.org", "x.api.example.org"]), st.lists(FIELDS, max_size=4), TEXTS)
def test_to_another_host_nothing_changes(host: str, headers: list[tuple[bytes, bytes]], query: str) -> None:
    """A host that is not bound gets the request as it came; a placeholder in it is known as a leak."""
    done = swapped("GET", host, f"/x?{query}", headers)

    assert done is not None
    assert (done.path, done.headers[1:], done.used) == (f"/x?{query}", headers, ())
    if any(token in query for token in TOKENS):
        assert RUN.leaks(done.path.encode())


@given(st.binary(max_size=400), st.integers(0, 2), st.integers(0, 400))
def test_a_placeholder_in_any_bytes_is_found(noise: bytes, which: int, at: int) -> None:
    """Whatever stands round it, plain and percent-encoded; without it, the same bytes are no leak."""
    token = TOKENS[which]
    escaped = "".join(f"%{byte:02x}" for byte in token.encode()).encode()

    assert not RUN.leaks(noise)
    assert RUN.leaks(noise[:at] + token.encode() + noise[at:])
    assert RUN.leaks(noise[:at] + escaped + noise[at:])
