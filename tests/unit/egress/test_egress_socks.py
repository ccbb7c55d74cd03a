"""SOCKS5 messages."""

import pytest

from cloister.egress.socks import SocksError, parse_greeting, parse_request, reply

NAME = b"\x05\x01\x00\x03\x06a.test\x01\xbb"


def test_greetings():
    """A client that offers "no authentication" among others is served; one that does not is told so."""
    assert parse_greeting(b"\x05\x01\x00rest") == 3
    assert parse_greeting(b"\x05\x02\x02\x00") == 4
    assert parse_greeting(b"\x05\x02\x02") is None
    assert parse_greeting(b"") is None
    for data, answer in ((b"\x05\x01\x02", b"\x05\xff"), (b"\x05\x00", b"\x05\xff"), (b"\x04\x01", b"")):
        with pytest.raises(SocksError) as caught:
            parse_greeting(data)
        assert caught.value.reply == answer


@pytest.mark.parametrize(
    ("data", "host"),
    [
        (NAME, "a.test"),
        (b"\x05\x01\x00\x01\x7f\x00\x00\x01\x01\xbb", "127.0.0.1"),
        (b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x01\xbb", "::1"),
    ],
)
def test_requests(data, host):
    """Names and both kinds of addresses come out as text; every prefix waits; what follows is left alone."""
    assert parse_request(data + b"more") == (host, 443, len(data))
    assert [parse_request(data[:end]) for end in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (NAME.replace(b"\x05\x01", b"\x05\x02"), 7),
        (NAME.replace(b"\x05\x01", b"\x05\x03"), 7),
        (NAME.replace(b"\x00\x03", b"\x00\x02"), 8),
        (NAME.replace(b"\x00\x03", b"\x01\x03"), 1),
        (NAME.replace(b"\x01\xbb", b"\x00\x00"), 2),
        (NAME.replace(b"a.test", b"\xff.test"), 2),
    ],
)
def test_other_requests_are_refused_with_their_code(data, code):
    """BIND, UDP, unknown address types, port 0 and names beyond ASCII get the reply that RFC 1928 has for them."""
    with pytest.raises(SocksError) as caught:
        parse_request(data)
    assert caught.value.reply == reply(code)
