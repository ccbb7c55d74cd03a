"""The ClientHello reader and what a tunnel may begin with."""

import random
import struct

import pytest

from cloister.egress.clienthello import MAX_HELLO, Hello, HelloReader
from cloister.egress.decision import Target
from cloister.egress.hosts import parse_host
from cloister.egress.tunnel import judge_hello


def extension(kind, content):
    """Return one extension."""
    return struct.pack(">HH", kind, len(content)) + content


def server_name(*names, kind=0):
    """Return a server_name extension with any number of names."""
    entries = b"".join(struct.pack(">BH", kind, len(name)) + name for name in names)
    return extension(0, struct.pack(">H", len(entries)) + entries)


def hello(*extensions, record=16384, tail=b""):
    """Return a ClientHello cut into records of a size."""
    joined = b"".join(extensions)
    body = b"\x03\x03" + bytes(32) + b"\x20" + bytes(32) + b"\x00\x04\x13\x01\x0a\x0a" + b"\x01\x00"
    body += struct.pack(">H", len(joined)) + joined + tail
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    pieces = [message[at : at + record] for at in range(0, len(message), record)]
    return b"".join(b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece for piece in pieces)


def read(data, step=None):
    """Feed data in steps and return the first result."""
    reader = HelloReader()
    for at in range(0, len(data), step or len(data) or 1):
        result = reader.feed(data[at : at + (step or len(data))])
        if result is not None:
            return result
    return None


GREASE = extension(0x0A0A, b"")
KEY_SHARE = extension(51, random.Random(1).randbytes(1250))  # noqa: S311 - as large as X25519MLKEM768


@pytest.mark.parametrize("step", [None, 1, 7, 300])
@pytest.mark.parametrize("record", [16384, 100, 1])
def test_the_name_is_found_however_the_bytes_are_cut(step, record):
    """Reads and records of any size, GREASE, and a post-quantum key share before the name do not matter."""
    data = hello(GREASE, KEY_SHARE, server_name(b"a.test"), record=record)
    assert read(data, step) == Hello("tls", "a.test", ech=False)


def test_ech_is_reported():
    """Encrypted Client Hello hides the inner name; the reader says so and gives the outer one."""
    assert read(hello(server_name(b"outer.test"), extension(0xFE0D, b"\0" * 10))) == Hello(
        "tls", "outer.test", ech=True
    )


def test_a_hello_without_a_name_is_tls():
    """No extension, or no extensions at all, is still TLS."""
    assert read(hello(GREASE)) == Hello("tls")
    body = b"\x03\x01" + bytes(32) + b"\x00" + b"\x00\x02\x00\x2f" + b"\x01\x00"
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    assert read(b"\x16\x03\x01" + struct.pack(">H", len(message)) + message) == Hello("tls")


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1", b"SSH-2.0-x", b"\0", b"\x16\x02", b"\x80\x2e\x01\x03\x01", b"\x15\x03"]
)
def test_other_protocols_are_told_at_once(data):
    """The first bytes that cannot be TLS decide; nothing waits for more."""
    assert read(data) == Hello("not-tls")


@pytest.mark.parametrize(
    "data",
    [
        hello(server_name(b"a.test", b"b.test")),
        hello(server_name(b"a.test"), server_name(b"b.test")),
        hello(server_name(b"a.test", kind=1)),
        hello(server_name(b"")),
        hello(server_name("\xe4.test".encode())),
        hello(extension(0, b"")),
        hello(extension(0, b"\x00\xff\x00\x00\x01a")),
        hello(b"\x00\x00\x00\xff"),
        hello(server_name(b"a.test"), tail=b"x"),
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x01\x02",
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\x00",
        hello(record=20)[:25] + b"\x17\x03\x03\x00\x01x",
        b"\x16\x03\x01\x00\x01\x01" * MAX_HELLO,
    ],
)
def test_broken_hellos_are_not_guessed_at(data):
    """Two names, lengths that point outside, foreign records in the middle, and endless hellos are broken."""
    assert read(data).kind == "broken"


def test_an_incomplete_hello_waits():
    """Every true prefix waits for more; memory is bounded by the reader."""
    data = hello(server_name(b"a.test"), record=50)
    assert [read(data[:end]) for end in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize(
    ("host", "port", "first", "reason"),
    [
        ("a.test", 443, Hello("tls", "a.test"), None),
        ("a.test", 443, Hello("tls", "A.TEST"), None),
        ("a.test", 22, Hello("tls", "a.test"), None),
        ("a.test", 22, Hello("not-tls"), None),
        ("1.1.1.1", 443, Hello("tls"), None),
        ("a.test", 443, Hello("not-tls"), "not-tls"),
        ("1.1.1.1", 443, Hello("not-tls"), "not-tls"),
        ("a.test", 443, Hello("tls"), "sni-missing"),
        ("a.test", 22, Hello("tls"), "sni-missing"),
        ("a.test", 443, Hello("tls", "b.test"), "sni-mismatch"),
        ("a.test", 443, Hello("tls", "a.test\0.b.test"), "sni-mismatch"),
        ("a.test", 443, Hello("tls", "x.a.test"), "sni-mismatch"),
        ("1.1.1.1", 443, Hello("tls", "b.test"), "sni-mismatch"),
        ("a.test", 22, Hello("broken"), "tls-hello-invalid"),
    ],
)
def test_first_bytes_of_a_tunnel(host, port, first, reason):
    """TLS must ask for the tunnel's host; TLS-only ports carry nothing else; other ports may carry anything."""
    verdict = judge_hello(Target("connect", parse_host(host), port), first)
    assert (verdict.reason if verdict else None) == reason
