"""Host spellings: every spelling of one host is one host, and tricks are refused."""

import pytest

from cloister.egress.hosts import HostError, is_public_name, is_reserved, parse_address, parse_authority, parse_host

LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0X7F.1", "0x7f.0x1", "0177.0.0.1", "017700000001",
    "127.0.0.1.", "[::ffff:127.0.0.1]", "::ffff:7f00:1", "[::FFFF:7F00:0001]", "[0:0:0:0:0:ffff:127.0.0.1]",
]  # fmt: skip

TRICKS = [
    "", ".", "..", "a..b", ".a", "a..", "a b", "a\tb", "a\nb", "a\r\nb",
    "evil.test\0.good.test", "user@host", "u:p@host",
    "a%2eb", "%61", "fe80::1%eth0", "[fe80::1%25eth0]", "[::1", "::1]", "[127.0.0.1]", "[a.test]", "1.2.3.4.5", "256.1",
    "1.2.3.256", "4294967296", "0x100000000", "0x", "08.1", "1..2", "a.1", "a.0x1", "b\xfccher.test", "\u3002.test",
    "a\u3002b", "\uff41.test", "-a.test", "a-.test", "a/b", "a\\b", "a?b", "a#b", "a,b", "a;b", "*", "*.a", "a" * 64,
    ".".join(["a" * 60] * 5), "1" * 5000, "[::1]x", "[]", ":", "::1::",
]  # fmt: skip


@pytest.mark.parametrize("text", LOOPBACK)
def test_every_spelling_of_loopback_is_loopback(text):
    """inet_aton(3) forms, a trailing dot and v4-mapped IPv6 all become 127.0.0.1."""
    assert parse_host(text).text == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Example.ORG.", "example.org"),
        ("_dmarc.a_b.example.org", "_dmarc.a_b.example.org"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("3com.example", "3com.example"),
        ("localhost", "localhost"),
        ("[2001:DB8:0:0::1]", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("1.1.1.1", "1.1.1.1"),
        ("010.0.0.1", "8.0.0.1"),
    ],
)
def test_good_hosts_have_one_spelling(text, expected):
    """Case, one trailing dot, brackets and zero runs do not matter."""
    assert parse_host(text).text == expected


@pytest.mark.parametrize("text", TRICKS)
def test_tricks_are_no_hosts(text):
    """NUL, user information, escapes, zone ids, Unicode dots and malformed numbers are refused with a sentence."""
    with pytest.raises(HostError) as caught:
        parse_host(text)
    assert caught.value.explanation


@pytest.mark.parametrize(
    "text",
    ["a", "a:", "a:0", "a:65536", "a:0443", "a:+1", "a:-1", "a:1:2", "a: 1", "a:1 ", "::1:80", "[::1]", "u@a:1", ":1"],
)
def test_an_authority_needs_one_good_port(text):
    """Absent, repeated, signed, padded and impossible ports are refused; so is IPv6 without brackets."""
    with pytest.raises(HostError):
        parse_authority(text)


def test_authorities_are_split():
    """The positive twin: names, brackets and default ports."""
    assert parse_authority("A.test:443") == (parse_host("a.test"), 443)
    assert parse_authority("[::2]:1")[0].authority(1) == "[::2]:1"
    assert parse_authority("[::2]", 80)[1] == 80
    assert parse_authority("a.test", 80)[1] == 80


def test_public_names_are_told_from_local_ones():
    """Special-use suffixes and single labels are not public; names that only look alike are."""
    for name in ("printer", "nas.local", "x.internal", "router.home.arpa", "a.onion", "db.corp", "localhost"):
        assert not is_public_name(name)
    for name in ("example.org", "local.example.org", "internal.com", "arpa.org"):
        assert is_public_name(name)


def test_reserved_names_are_the_proxys():
    """`cloister.internal` and names below it, not names that end alike."""
    assert is_reserved("cloister.internal")
    assert is_reserved("a.cloister.internal")
    assert not is_reserved("notcloister.internal")


def test_resolver_answers_are_read():
    """Zone ids are cut off, since the guard judges the address; garbage is none."""
    assert str(parse_address("fe80::1%eth0")) == "fe80::1"
    assert parse_address("example.org") is None
    assert parse_address("") is None
