"""The units of the packet filter: loaded before any network, never unloaded by stopping, watched."""

import re

from cloister.isolation import firewall_units
from cloister.plan.firewall import FILE, WATCHDOG_UNIT


def _keys(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_the_filter_is_loaded_before_the_network_by_nft_alone() -> None:
    """Nothing of ours but the file is needed at boot, and stopping the unit takes nothing away."""
    keys = _keys(firewall_units.firewall_unit("/usr/sbin/nft"))

    assert keys["ExecStart"] == [f"/usr/sbin/nft -f {FILE}"]
    assert "network-pre.target" in keys["Before"][0]
    assert keys["DefaultDependencies"] == ["no"]
    assert "ExecStop" not in keys
    assert keys["After"] == keys["PartOf"] == ["nftables.service"]


def test_both_hold_one_capability() -> None:
    """Root without what makes root: CAP_NET_ADMIN, no new privileges, no namespaces, nothing of the home."""
    for text in (
        firewall_units.firewall_unit("/usr/sbin/nft"),
        firewall_units.watchdog_unit("/opt/cloister/bin/python"),
    ):
        keys = _keys(text)
        assert keys["CapabilityBoundingSet"] == ["CAP_NET_ADMIN"]
        assert keys["NoNewPrivileges"] == keys["RestrictNamespaces"] == keys["ProtectHome"] == ["yes"]
        assert keys["ProtectSystem"] == ["strict"]


def test_what_shares_the_hosts_network_ends_with_the_watchdog() -> None:
    """The properties bind a unit to the watchdog, and order it behind the watchdog's first look."""
    assert dict(firewall_units.BOUND) == {"BindsTo": WATCHDOG_UNIT, "After": WATCHDOG_UNIT}
    assert _keys(firewall_units.watchdog_unit("/p"))["Type"] == ["notify"]
