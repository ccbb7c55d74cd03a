"""The address guard: what is refused, and what an exception opens and does not open."""

from ipaddress import ip_address, ip_network

import pytest

from cloister.egress.addresses import Guard, embedded, parse_network

REFUSED = [
    "0.0.0.0",  # noqa: S104 - a spelling of loopback for connect(2)
    "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.100", "100.127.255.255", "127.0.0.1", "127.255.0.1",
    "169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.251",
    "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "100.100.100.200",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:10.0.0.1", "::ffff:0:8.8.8.8", "64:ff9b::8.8.8.8",
    "64:ff9b::10.0.0.1", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:db8::1", "2002:808:808::1",
    "2002:7f00:1::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fd00:ec2:1::5", "fd20:ce::254",
    "fd00:c1::a9fe:a9fe", "fd00:42::42", "fd7a:115c:a1e0::1", "fe80::1", "fec0::1", "ff02::fb", "4000::1", "8000::1",
    "2600::5efe:10.0.0.1", "2600::200:5efe:127.0.0.1",
]  # fmt: skip

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "198.17.255.255", "198.20.0.0", "223.255.255.255",
    "168.63.129.15", "::ffff:8.8.8.8", "2606:4700::1111", "2001:4860:4860::8888", "2600::5efe:8.8.8.8", "2003::1",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_special_addresses_are_refused(text):
    """Each address of the special-purpose registries and each metadata endpoint is refused, with a reason."""
    refusal = Guard().check(ip_address(text))
    assert refusal is not None
    assert refusal.why


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_pass(text):
    """The positive twin, with the neighbours of every refused range."""
    assert Guard().check(ip_address(text)) is None


def test_the_hosts_own_addresses_are_refused_even_when_public():
    """An address of this host is refused, in its v4-mapped spelling as well; its neighbour passes."""
    guard = Guard([ip_address("1.2.3.4"), ip_address("2600::1")])
    for text in ("1.2.3.4", "::ffff:1.2.3.4", "2600::1"):
        refusal = guard.check(ip_address(text))
        assert refusal is not None
        assert refusal.kind == "own"
    assert guard.check(ip_address("1.2.3.5")) is None


def test_an_exception_opens_only_what_lies_inside_it():
    """One NAS is opened; the rest of its network, metadata and the host's own address stay closed."""
    guard = Guard([ip_address("192.168.1.5")], [ip_network("192.168.1.0/24"), ip_network("169.254.0.0/16")])
    assert guard.check(ip_address("192.168.1.20")) is None
    assert guard.check(ip_address("::ffff:192.168.1.20")) is None
    assert guard.check(ip_address("169.254.1.1")) is None
    for text in ("192.168.2.20", "192.168.1.5", "169.254.169.254", "2002:c0a8:114::1", "64:ff9b::192.168.1.20"):
        assert guard.check(ip_address(text)) is not None, text


def test_metadata_is_opened_by_its_own_address_alone():
    """Whoever really wants a metadata endpoint names it."""
    address = ip_address("169.254.169.254")
    assert Guard([], [ip_network("169.254.169.254/32")]).check(address) is None
    assert Guard([], [ip_network("169.254.169.252/30")]).check(address) is not None


def test_nat64_is_judged_by_both_of_its_addresses():
    """With the translator's prefix opened, public addresses pass and private ones behind it do not."""
    guard = Guard([], [ip_network("64:ff9b::/96")])
    assert guard.check(ip_address("64:ff9b::8.8.8.8")) is None
    refusal = guard.check(ip_address("64:ff9b::169.254.169.254"))
    assert refusal is not None
    assert refusal.kind == "metadata"


def test_an_exception_wider_than_a_refused_range_opens_nothing():
    """0.0.0.0/0 and 10.0.0.0/7 are mistakes, not switches."""
    for text in ("0.0.0.0/0", "10.0.0.0/7", "8.8.8.0/24"):
        network = ip_network(text)
        guard = Guard([], [network])
        assert guard.check(ip_address("10.0.0.1")) is not None
        assert not guard.lifts_something(network)
    assert Guard().lifts_something(ip_network("10.0.0.0/8"))


def test_embedded_addresses_are_found():
    """Teredo hides its client by inverting the bits; both of its addresses count."""
    found = embedded(ip_address("2001:0:4136:e378:8000:63bf:3fff:fdd2"))
    assert [str(address) for address in found] == ["65.54.227.120", "192.0.2.45"]
    assert embedded(ip_address("2606:4700::1")) == []


def test_networks_are_read():
    """v4-mapped networks are IPv4; host bits are a mistake."""
    assert parse_network("::ffff:10.0.0.0/104") == ip_network("10.0.0.0/8")
    assert parse_network("10.0.0.1") == ip_network("10.0.0.1/32")
    with pytest.raises(ValueError, match="host bits"):
        parse_network("10.0.0.1/8")
