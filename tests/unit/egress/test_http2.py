"""Heads between HTTP/2 and what the relay works with."""

import pytest

from cloister.egress import http2
from cloister.egress.hosts import parse_host
from cloister.egress.http1 import Body, HttpError, RequestLine

BASE = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a.test"), (b":path", b"/x")]


def test_a_request_is_taken_apart():
    """Method, path, host and body come out of the `:names`; a body without a length is chunked, none is none."""
    head = http2.read_request([*BASE, (b"accept", b"*/*")], ended=True)
    assert head == ("GET", b"/x", [(b"host", b"a.test"), (b"accept", b"*/*")], Body("none"))
    assert http2.read_request(BASE, ended=False).body == Body("chunked")
    assert http2.read_request([*BASE, (b"content-length", b"5")], ended=False).body == Body("length", 5)
    assert http2.read_request([(b":method", b"POST"), *BASE[1:]], ended=True).body == Body("length", 0)


@pytest.mark.parametrize(
    "fields",
    [
        BASE[1:],
        [(b":method", b"GET /"), *BASE[1:]],
        [BASE[0], (b":scheme", b"http"), *BASE[2:]],
        [*BASE, (b"connection", b"x")],
        [*BASE, (b"transfer-encoding", b"chunked")],
        [*BASE, (b"keep-alive", b"1")],
        [*BASE, (b"upgrade", b"websocket")],
        [*BASE, (b":protocol", b"websocket")],
        [*BASE, (b"x", b"a\r\nb")],
        [*BASE, (b"x y", b"a")],
        [*BASE, (b"content-length", b"5")],
        [*BASE, (b"content-length", b"0"), (b"content-length", b"0")],
        [*BASE, (b"content-length", b"+0")],
    ],
)
def test_what_would_mean_something_else_in_http1_is_refused(fields):
    """Connection fields, line breaks, missing parts, false lengths: none of them is passed on."""
    with pytest.raises(HttpError):
        http2.read_request(fields, ended=True)


def test_two_hosts_stay_two():
    """A Host that differs from `:authority` is kept beside it, so that the check of the host sees both."""
    same = http2.read_request([*BASE, (b"host", b"a.test")], ended=True)
    assert [value for name, value in same.headers if name == b"host"] == [b"a.test"]
    other = http2.read_request([*BASE, (b"host", b"b.test")], ended=True)
    assert [value for name, value in other.headers if name == b"host"] == [b"a.test", b"b.test"]


def test_heads_for_servers_and_clients_hold_nothing_of_one_connection():
    """Fields in lower case, our authority and length, no connection fields, `te` only where trailers are taken."""
    line = RequestLine(parse_host("a.test"), 443, "/x", 443)
    headers = [(b"Host", b"evil"), (b"Connection", b"x-gone"), (b"X-Gone", b"1"), (b"TE", b"gzip"), (b"X-Kept", b" 1 ")]
    fields = http2.request_fields("PUT", line, headers, Body("length", 7), trailers=True)
    assert fields == [
        (b":method", b"PUT"), (b":scheme", b"https"), (b":authority", b"a.test"), (b":path", b"/x"),
        (b"x-kept", b"1"), (b"content-length", b"7"), (b"te", b"trailers"),
    ]  # fmt: skip
    answer = [(b"Content-Length", b"3"), (b"Keep-Alive", b"5"), (b"Transfer-Encoding", b"chunked"), (b"Etag", b"x")]
    assert http2.response_fields(200, answer, Body("length", 3)) == [
        (b":status", b"200"), (b"content-length", b"3"), (b"etag", b"x"),
    ]  # fmt: skip
    assert (b"content-length", b"3") not in http2.response_fields(200, answer, Body("chunked"))


def test_responses_are_taken_apart():
    """Status and framing come out; a status that is none is refused."""
    assert http2.read_response([(b":status", b"200"), (b"content-length", b"3")], "GET", ended=False) == (
        200, [(b"content-length", b"3")], Body("length", 3),
    )  # fmt: skip
    assert http2.read_response([(b":status", b"200")], "GET", ended=False)[2] == Body("close")
    assert http2.read_response([(b":status", b"200")], "GET", ended=True)[2] == Body("length", 0)
    assert http2.read_response([(b":status", b"204")], "GET", ended=True)[2] == Body("none")
    for status in (b"", b"2000", b"abc", b"099", b"600"):
        with pytest.raises(HttpError):
            http2.read_response([(b":status", status)], "GET", ended=False)
