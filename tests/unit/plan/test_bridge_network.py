"""The bridge of microVMs as data: where it goes, who is on it."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from cloister.plan.bridge import (
    ALTERNATIVES,
    DEFAULT_NETWORK,
    Network,
    Tap,
    address_of,
    choose_network,
    free_numbers,
    guest_mac,
    interface_of,
)


def test_the_wanted_network_is_taken_where_nothing_is_in_its_way() -> None:
    """Neighbouring networks, default routes and a VPN's halves of the internet are not."""
    taken = ["192.168.1.7/24", "10.0.1.0/24", "0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"]

    assert choose_network(DEFAULT_NETWORK, taken) == Network(network=DEFAULT_NETWORK, wanted=DEFAULT_NETWORK)


@pytest.mark.parametrize("taken", ["10.0.0.0/24", "10.0.0.77/32", "10.0.0.0/16", "10.0.0.128/25"])
def test_a_collision_moves_the_bridge_and_says_with_what(taken: str) -> None:
    """An interface, a route, a wider or a narrower network: any address in common counts."""
    found = choose_network(DEFAULT_NETWORK, [taken])

    assert not IPv4Network(found.network).overlaps(IPv4Network(taken))
    assert found.taken_by == taken
    assert found.describe() == f"{found.network} instead of 10.0.0.0/24, where this host has {taken}"


def test_alternatives_are_taken_in_their_order_and_end() -> None:
    """The next free one counts; where all are taken the bridge is refused."""
    taken = [DEFAULT_NETWORK]
    for alternative in ALTERNATIVES:
        assert choose_network(DEFAULT_NETWORK, taken).network == alternative
        taken.append(alternative)
    with pytest.raises(ValueError, match="every alternative"):
        choose_network(DEFAULT_NETWORK, taken)


def test_no_two_guests_have_an_address() -> None:
    """Numbers 2 to 254 that nobody has; the gateway's is none of them."""
    used = [address_of(DEFAULT_NETWORK, number) for number in range(2, 254)]

    assert free_numbers(DEFAULT_NETWORK, used) == (254,)
    assert len(free_numbers(DEFAULT_NETWORK, [])) == 253  # of a /24
    assert choose_network(DEFAULT_NETWORK, []).gateway == "10.0.0.1"


def test_macs_are_of_a_run_local_and_of_one_station() -> None:
    """Another run or user gives another MAC, so a clone's is new; none is a manufacturer's or a group's."""
    macs = [guest_mac(uid, f"run-{number}") for uid in (1000, 1001) for number in range(200)]

    assert len(set(macs)) == len(macs)
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)  # IEEE 802: local, individual


def test_what_a_guest_is_told() -> None:
    """Its address comes with the prefix."""
    tap = Tap(name="clvm7", mac="52:54:00:00:00:01", own_mac="06:c1:00:00:00:01", address="10.0.0.7",
              gateway="10.0.0.1", port=4000, uid=1000, run="r1")  # fmt: skip

    assert interface_of(tap) == "10.0.0.7/24"
