"""The unit of the bridge of microVMs."""

from __future__ import annotations

from cloister.isolation.bridge_units import bridge_unit, bridge_wanted
from cloister.isolation.unit_files import DaemonFacts, hostd_service
from cloister.plan.bridge import FILE, UNIT


def test_the_daemon_has_one_power_and_no_network() -> None:
    """CAP_NET_ADMIN, netlink and the audit's socket; the network that the policy wants is its only word."""
    text = bridge_unit("/opt/cloister/bin/python", "10.9.8.0/24")

    assert "ExecStart=/opt/cloister/bin/python -I -m cloister.services.bridge 10.9.8.0/24\n" in text
    assert "CapabilityBoundingSet=CAP_NET_ADMIN\n" in text
    assert "RestrictAddressFamilies=AF_NETLINK AF_UNIX\n" in text


def test_a_new_filter_starts_it_again() -> None:
    """The unit is enabled, and restarted for its own file and the filter's."""
    wanted = bridge_wanted()

    assert (wanted.unit, wanted.enabled, wanted.active) == (UNIT, True, True)
    assert FILE in wanted.restart_for


def test_hostd_has_one_device() -> None:
    """Taps are made of /dev/net/tun; no other device of the host is there."""
    text = hostd_service(DaemonFacts(python="/opt/cloister/bin/python", root_links={}, root_directories=()))

    assert [line for line in text.splitlines() if "Device" in line] == [
        "PrivateDevices=yes", "DeviceAllow=/dev/net/tun rw", "DevicePolicy=closed",
    ]  # fmt: skip
