"""HTTP heads: targets, framing, and what is written."""

import pytest

from cloister.egress import http1
from cloister.egress.hosts import parse_host
from cloister.egress.http1 import Body, HttpError, RequestLine, ResponseHead


@pytest.mark.parametrize(
    ("url", "authority", "target"),
    [
        (b"http://a.test", "a.test:80", "/"),
        (b"HTTP://A.test:8080/x?y#"[:-1], "a.test:8080", "/x?y"),
        (b"http://a.test?q=http://b.test/", "a.test:80", "/?q=http://b.test/"),
        (b"http://[::2]:81/", "[::2]:81", "/"),
        (b"http://2130706433/", "127.0.0.1:80", "/"),
    ],
)
def test_absolute_targets(url, authority, target):
    """Host and port come out canonical, path and query as they were sent."""
    line = http1.parse_absolute("GET", url)
    assert (line.host.authority(line.port), line.target) == (authority, target)
    assert http1.parse_absolute("OPTIONS", b"http://a.test").target == "*"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (b"/path", "bad-request"),
        (b"https://a.test/", "bad-request"),
        (b"ftp://a.test/", "bad-request"),
        (b"http://a.test/#x", "bad-request"),
        (b"http://a.test/\xc3\xa4", "bad-request"),
        (b"http://a.test/a b", "bad-request"),
        (b"http:///x", "host-invalid"),
        (b"http://good.test@evil.test/", "host-invalid"),
        (b"http://a.test:80:90/", "host-invalid"),
        (b"http://a.test\\@b.test/", "host-invalid"),
        (b"http://a%00.test/", "host-invalid"),
        (b"http:/a.test/", "bad-request"),
    ],
)
def test_other_targets_are_refused(url, reason):
    """Origin form, other schemes, fragments, user information and strange hosts get a reason."""
    with pytest.raises(HttpError) as caught:
        http1.parse_absolute("GET", url)
    assert caught.value.reason == reason


def test_connect_targets():
    """CONNECT takes `host:port` and nothing else."""
    assert http1.parse_connect(b"A.test:443") == (parse_host("a.test"), 443)
    for url in (b"a.test", b"http://a.test:443", b"a.test:443/x", b"u@a.test:443", b"::1:443", b""):
        with pytest.raises(HttpError):
            http1.parse_connect(url)


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ([], Body("none")),
        ([(b"Content-Length", b"0")], Body("length", 0)),
        ([(b"content-length", b" 12 ")], Body("length", 12)),
        ([(b"Transfer-Encoding", b"Chunked")], Body("chunked")),
    ],
)
def test_framing_of_requests(fields, body):
    """One way to delimit a body, or none."""
    assert http1.request_body(fields, "1.1") == body


@pytest.mark.parametrize(
    "fields",
    [
        [(b"Content-Length", b"1"), (b"Content-Length", b"1")],
        [(b"Content-Length", b"1,1")],
        [(b"Content-Length", b"-1")],
        [(b"Content-Length", b"0x1")],
        [(b"Content-Length", b"9" * 19)],
        [(b"Content-Length", b"1"), (b"Transfer-Encoding", b"chunked")],
        [(b"Transfer-Encoding", b"gzip, chunked")],
        [(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")],
    ],
)
def test_framing_that_readers_disagree_about(fields):
    """Repeated, listed, signed and contradicting lengths are refused in requests and responses."""
    with pytest.raises(HttpError):
        http1.request_body(fields, "1.1")
    with pytest.raises(HttpError):
        http1.response_body(200, "GET", fields, "1.1")


def test_framing_of_responses():
    """HEAD, 204 and 304 have no body; without a length the connection's end delimits it; 1.0 knows no chunks."""
    length = [(b"Content-Length", b"5")]
    assert http1.response_body(200, "HEAD", length, "1.1").framing == "none"
    assert http1.response_body(304, "GET", length, "1.1").framing == "none"
    assert http1.response_body(200, "GET", [], "1.1").framing == "close"
    assert http1.response_body(200, "GET", length, "1.1") == Body("length", 5)
    with pytest.raises(HttpError):
        http1.request_body([(b"Transfer-Encoding", b"chunked")], "1.0")


def test_request_heads_are_our_own():
    """Our Host and framing, no hop-by-hop field, not those Connection names; all others in order and untouched."""
    fields = [
        (b"host", b"evil"), (b"A", b"\xff 1"), (b"Connection", b"keep-alive, X-Hop"),
        (b"x-hop", b"1"), (b"TE", b"trailers"),
        (b"Proxy-Authorization", b"s"), (b"Content-Length", b"7"), (b"Transfer-Encoding", b"x"), (b"b", b""),
    ]  # fmt: skip
    line = RequestLine(parse_host("a.test"), 80, "/x")
    head = http1.request_head("PUT", line, fields, Body("length", 3))
    assert head == b"PUT /x HTTP/1.1\r\nHost: a.test\r\nA: \xff 1\r\nb: \r\nContent-Length: 3\r\n\r\n"


def test_response_heads_are_our_own():
    """A phrase with control characters is dropped; a length is kept only where no body follows by nature."""
    fields = [(b"Content-Length", b"9"), (b"Upgrade", b"h2c"), (b"Set-Cookie", b"a"), (b"Set-Cookie", b"b")]
    head = ResponseHead(200, b"a\rb", fields, Body("chunked")).encode()
    assert head == b"HTTP/1.1 200 \r\nSet-Cookie: a\r\nSet-Cookie: b\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b"Content-Length: 9\r\n" in ResponseHead(200, b"", fields, Body("none"), keep_length=True).encode()


def test_only_websocket_is_an_upgrade():
    """h2c and lists are stripped; WebSocket needs both fields."""
    both = [(b"Upgrade", b"WebSocket"), (b"Connection", b"keep-alive, Upgrade")]
    assert http1.wants_websocket(both)
    assert not http1.wants_websocket(both[:1])
    assert not http1.wants_websocket([(b"Upgrade", b"h2c"), both[1]])
    assert not http1.wants_websocket([(b"Upgrade", b"websocket, h2c"), both[1]])


def test_trailers_cannot_change_the_message():
    """Framing, routing and authority fields in trailers are dropped, others kept."""
    assert http1.last_chunk([(b"Host", b"x"), (b"Authorization", b"x"), (b"X-Sum", b"1")]) == b"0\r\nX-Sum: 1\r\n\r\n"


def test_answers_of_an_upstream_proxy():
    """Status and size once complete; garbage and endless heads are refused."""
    assert http1.parse_proxy_reply(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nrest") == (200, 25)
    assert http1.parse_proxy_reply(b"HTTP/1.0 407\r\n\r\n") == (407, 16)
    assert http1.parse_proxy_reply(b"HTTP/1.1 200 OK\r\n") is None
    for data in (b"SSH\r\n\r\n", b"x" * 20000):
        with pytest.raises(HttpError):
            http1.parse_proxy_reply(data)
