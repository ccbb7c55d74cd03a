"""Anything at all, fed to what decides about egress: it answers or refuses, and spelling does not matter."""

from __future__ import annotations

import contextlib
import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloister.egress import http1, socks
from cloister.egress.addresses import Guard
from cloister.egress.clienthello import MAX_HELLO, HelloReader
from cloister.egress.decision import Target, decide
from cloister.egress.hosts import HostError, parse_authority, parse_host
from cloister.egress.paths import PathError, PathPattern, canonical_path
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import PolicyError
from cloister.policy.model import Egress, EgressRule

LABEL = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,8}[a-z0-9_])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=5).map(lambda labels: ".".join([*labels, "test"]))
TEXT = st.text(alphabet=st.sampled_from("aZ09.-_:[]%@/\\ \0\r\nx\xe4\u3002*?#"), max_size=40) | st.text(max_size=40)


@given(TEXT)
def test_any_text_is_a_host_or_refused(text):
    """Parsing never fails otherwise, and what comes out is a fixed point."""
    with contextlib.suppress(HostError):
        host = parse_host(text)
        assert parse_host(host.text) == host
        assert parse_authority(host.authority(443)) == (host, 443)


@given(NAME, st.data())
def test_names_have_one_form(name, data):
    """Upper case and one trailing dot change nothing; a second dot is refused."""
    upper = "".join(char.upper() if data.draw(st.booleans()) else char for char in name)
    assert parse_host(upper + data.draw(st.sampled_from(["", "."]))).text == name
    with pytest.raises(HostError):
        parse_host(name + "..")


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.lists(st.sampled_from("dox"), min_size=4, max_size=4))
def test_every_number_spelling_of_an_address_is_that_address(number, parts, bases):
    """Decimal, octal and hex in one to four parts agree with the ipaddress module on what they mean."""
    values = [number >> (24 - 8 * index) & 255 for index in range(parts - 1)]
    values.append(number & (1 << 8 * (5 - parts)) - 1)
    spelling = ".".join(
        {"d": str(value), "o": f"0{value:o}", "x": f"0x{value:X}"}[base]
        for value, base in zip(values, bases, strict=False)
    )
    address = ipaddress.IPv4Address(number)
    assert parse_host(spelling).address == address
    assert parse_host(f"[::ffff:{address}]").address == address


@given(st.integers(0, 2**128 - 1))
def test_every_spelling_of_an_ipv6_address_is_that_address(number):
    """Full, short and bracketed forms agree."""
    address = ipaddress.IPv6Address(number)
    expected = address.ipv4_mapped or address
    for text in (str(address), address.exploded.upper(), f"[{address}]"):
        assert parse_host(text).address == expected


@given(st.integers(0, 2**32 - 1) | st.integers(0, 2**128 - 1))
@example(int(ipaddress.ip_address("64:ff9b::7f00:1")))
def test_the_guard_passes_only_what_the_registry_calls_global(number):
    """Nothing that Python's copy of the IANA registry calls private, reserved or multicast passes."""
    for address in {ipaddress.IPv6Address(number), ipaddress.IPv4Address(number & 0xFFFFFFFF)}:
        judged = getattr(address, "ipv4_mapped", None) or address
        if Guard().check(address) is None:
            assert judged.is_global
            assert not judged.is_multicast
            assert not judged.is_reserved
            assert not judged.is_link_local


@given(st.lists(NAME, max_size=4), st.lists(NAME, max_size=4), NAME, st.integers(1, 65535))
def test_a_denied_name_is_never_allowed(allow, deny, host, port):
    """Whatever is allowed, a name on the deny list is not reachable; what only allow names is."""
    egress = Egress(allow=tuple(f"{name}:{port}" for name in allow), deny=tuple(deny))
    verdict = decide(compile_ruleset(egress), Guard(), Target("connect", parse_host(host), port))
    assert verdict.allowed == (host in allow and host not in deny)


@given(NAME, NAME, st.booleans())
def test_wildcards_reach_exactly_the_names_below(suffix, other, below):
    """`*.name` means names that end in `.name`."""
    host = f"{other.removesuffix('.test')}.{suffix}" if below else other
    verdict = decide(compile_ruleset(Egress(allow=(f"*.{suffix}",))), Guard(), Target("socks5", parse_host(host), 443))
    assert verdict.allowed == host.endswith("." + suffix)


@given(TEXT, st.lists(TEXT, max_size=2), st.integers(-1, 70000), TEXT)
def test_any_rule_compiles_or_is_a_mistake(text, paths, port, private):
    """Nothing in a policy raises anything but PolicyError."""
    rule = EgressRule(host=text, port=port, methods=(text,), paths=tuple(paths))
    for egress in (Egress(allow=(text,)), Egress(deny=(rule,)), Egress(private=(private,))):
        with contextlib.suppress(PolicyError):
            compile_ruleset(egress)
            compile_guard(egress)


@given(st.text(alphabet="/.%2efF5cC;a\\?b*", max_size=24).map("/".__add__))
@example("/repos/%2e%2e/x")
@example("/repos/..%2fx")
def test_no_spelling_of_a_path_climbs_out_of_a_pattern(path):
    """A path that matches `/repos/**` stays below /repos for every server, however often it decodes and resolves."""
    with contextlib.suppress(PathError):
        if PathPattern("/repos/**").matches(canonical_path("/repos" + path)):
            assert resolve("/repos" + path).startswith("/repos/")


def resolve(path: str) -> str:
    """Read a path as the most eager server would: decode until nothing changes, cut parameters, resolve dots."""
    from urllib.parse import unquote

    path = path.split("?", 1)[0]
    while unquote(path) != path:
        path = unquote(path)
    done: list[str] = []
    for segment in path.replace("\\", "/").split("/"):
        bare = segment.split(";", 1)[0]
        if bare == "..":
            done = done[:-1]
        elif bare not in {"", "."}:
            done.append(bare)
    return "/" + "/".join(done) + "/"


@given(st.binary(max_size=600), st.integers(1, 64))
def test_any_bytes_as_a_client_hello(data, step):
    """The reader never fails, and cutting the bytes differently gives the same answer."""
    for prefix in (b"", b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc\x03\x03" + bytes(32)):
        assert feed(prefix + data, step) == feed(prefix + data, MAX_HELLO)


def feed(data: bytes, step: int):
    """Feed a reader in steps."""
    reader = HelloReader()
    for at in range(0, len(data), step):
        result = reader.feed(data[at : at + step])
        if result is not None:
            return result
    return None


@given(st.binary(max_size=300))
def test_any_bytes_as_socks(data):
    """Both messages parse, wait or are refused, and a result never depends on bytes after it."""
    for prefix in (b"", b"\x05\x01\x00\x03"):
        for parse in (socks.parse_greeting, socks.parse_request):
            with contextlib.suppress(socks.SocksError):
                result = parse(prefix + data)
                assert result is not None or len(prefix + data) < socks.MAX_MESSAGE
                if result is not None:
                    assert parse(prefix + data + b"x") == result


@given(st.binary(max_size=80), st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=5))
@example(b"http://a.test/", [(b"A", b"b\r\nHost: evil")])
def test_no_head_that_is_written_holds_a_second_one(url, fields):
    """Whatever fields pass the check, the head that is written has our lines and theirs, one each, and one end."""
    with contextlib.suppress(http1.HttpError):
        line = http1.parse_absolute("GET", b"http://a.test/" + url)
        http1.check_headers(fields)
        body = http1.request_body(fields, "1.1")
        head = http1.request_head("GET", line, fields, body)
        assert head.count(b"\r\n\r\n") == 1
        assert head.endswith(b"\r\n\r\n")
        assert head.count(b"\n") == head.count(b"\r\n") <= 4 + len(fields)
        lower = head.lower()
        assert lower.count(b"\r\nhost: ") == 1
        assert lower.count(b"\r\ncontent-length:") + lower.count(b"\r\ntransfer-encoding:") <= 1
