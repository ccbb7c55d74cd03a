"""`no_proxy`: which hosts go round an upstream proxy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.egress.bypass import parse_bypass
from cloister.egress.hosts import parse_host

LIST = "example.org, .internal.example.com,10.0.0.0/8 192.0.2.7,[2001:db8::1]:8443,only.example.net:8080,*.wild.test"


@pytest.mark.parametrize(
    ("host", "port", "direct"),
    [
        ("example.org", 443, True), ("www.example.org", 80, True), ("notexample.org", 443, False),
        ("internal.example.com", 1, True), ("a.internal.example.com", 1, True), ("example.com", 443, False),
        ("10.9.8.7", 22, True), ("11.0.0.1", 22, False), ("192.0.2.7", 80, True), ("192.0.2.8", 80, False),
        ("2001:db8::1", 8443, True), ("2001:db8::1", 443, False), ("only.example.net", 8080, True),
        ("only.example.net", 443, False), ("a.wild.test", 443, True),
    ],
)  # fmt: skip
def test_names_networks_and_ports(host: str, port: int, direct: bool) -> None:
    """A name stands for itself and what is below it, a network for its addresses, a port for that port only."""
    assert parse_bypass(LIST).covers(parse_host(host), port) is direct


def test_a_star_is_everything_and_nothing_is_nothing() -> None:
    """`*` sends all round the proxy; an empty list, or stray commas and dots, send nothing."""
    assert parse_bypass("*").covers(parse_host("example.org"), 443)
    for text in ("", ",", " , ", ".", "[", ":", "..", "*."):
        assert not parse_bypass(text).covers(parse_host("example.org"), 443), text


@given(st.text(max_size=60))
def test_any_text_is_a_list(text: str) -> None:
    """The variable is the host's and may hold anything: it is read without an error."""
    parse_bypass(text).covers(parse_host("example.org"), 443)
