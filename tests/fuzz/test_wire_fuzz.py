"""Properties of what stands between two ends of TLS: masks, watches, and heads of two versions of HTTP."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials.mask import Masker
from cloister.egress import http1, http2
from cloister.egress.hosts import parse_host
from cloister.egress.http1 import Body, HttpError, RequestLine
from cloister.relay.leaks import Watch

SMALL = st.text("ab*", max_size=60).map(str.encode)
SECRETS = st.lists(st.text("ab", min_size=1, max_size=5).map(str.encode), min_size=1, max_size=3)
TOKEN = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=12).map(str.encode)
VALUE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)
FIELDS = st.lists(st.tuples(TOKEN, VALUE), max_size=8)
ANY = st.binary(max_size=12)


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut a byte string at some places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


@given(SMALL, SECRETS, st.lists(st.integers(0, 100), max_size=8))
def test_masking_does_not_depend_on_pieces(data, secrets, cuts):
    """However a stream is cut, the result is that of masking it whole, which stars exactly what a secret covers."""
    masker = Masker(secrets)
    streamed = b"".join(masker.feed(piece) for piece in in_pieces(data, cuts)) + masker.flush()
    covered = {
        at + offset
        for secret in secrets
        for at in range(len(data))
        if data.startswith(secret, at)
        for offset in range(len(secret))
    }
    assert streamed == bytes(0x2A if at in covered else byte for at, byte in enumerate(data))
    assert len(streamed) == len(data)


class OneWord:
    """A broker with one placeholder."""

    overlap = 5

    def leaks(self, data: bytes, _place: tuple[str, int] | None = None) -> bool:
        """Find it."""
        return b"secret" in data


@given(st.text("secrt", max_size=40).map(str.encode), st.lists(st.integers(0, 60), max_size=10), st.data())
def test_a_watch_lets_no_placeholder_through(data, cuts, choices):
    """A body passes whole without a placeholder; with one, what passed holds none of it, unless it was sent slowly."""
    watch, passed, flushed = Watch(OneWord()), b"", False
    for piece in in_pieces(data, cuts):
        passed += watch.feed(piece)
        if watch.broken:
            break
        if choices.draw(st.booleans()):
            passed += watch.flush()  # the rest did not come in time
            flushed = True
    else:
        passed += watch.flush()
    assert watch.broken == (b"secret" in data)
    assert b"secret" not in passed
    if not watch.broken:
        assert passed == data
    elif not flushed:
        assert data.index(b"secret") >= len(passed)


@given(
    st.sampled_from(["GET", "POST", "PUT", "X"]),
    FIELDS,
    st.sampled_from([Body("none"), Body("length", 7), Body("chunked")]),
)
def test_both_versions_of_http_say_the_same(method, fields, body):
    """A head written for HTTP/1.1 and one for HTTP/2 carry the same fields in the same order."""
    line = RequestLine(parse_host("a.test"), 8443, "/p?q", 443)
    first = http1.request_head(method, line, fields, body).decode().split("\r\n")
    second = http2.request_fields(method, line, fields, body)
    plain = [tuple(text.split(": ", 1)) for text in first[1:] if text]
    ours = {"host", "transfer-encoding", "content-length"}
    kept = [(name.lower(), value) for name, value in plain if name.lower() not in ours]
    assert kept == [
        (name.decode(), value.decode())
        for name, value in second
        if not name.startswith(b":") and name != b"content-length"
    ]
    assert first[0].split() == [method, dict(second)[b":path"].decode(), "HTTP/1.1"]
    assert ("Host", dict(second)[b":authority"].decode()) in plain
    lengths = [value for name, value in second if name == b"content-length"]
    assert [value.encode() for name, value in plain if name == "Content-Length"] == lengths


@given(
    st.lists(st.tuples(TOKEN | ANY | st.sampled_from([b":path", b"host", b"te"]), VALUE | ANY), max_size=6),
    st.booleans(),
)
def test_a_head_of_http2_becomes_one_head_of_http1_or_none(fields, ended):
    """Whatever fields a stream brings: written as HTTP/1.1 they are one head with no line that nobody asked for."""
    base = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a.test")]
    try:
        head = http2.read_request([*base, (b":path", b"/"), *fields], ended=ended)
        line = http1.parse_origin(head.method, head.url, [b"a.test"], parse_host("a.test"), 443)
    except HttpError:
        return
    text = http1.request_head(head.method, line, head.headers, head.body)
    start, *lines = text.removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert text.count(b"\r\n\r\n") == 1
    assert re.fullmatch(rb"GET [\x21-\x7e]+ HTTP/1\.1", start)
    names = [one.split(b":")[0].lower() for one in lines]
    assert names.count(b"host") == 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert not {b"connection", b"upgrade", b"keep-alive"} & set(names)
    assert len(lines) <= len(fields) + 2
