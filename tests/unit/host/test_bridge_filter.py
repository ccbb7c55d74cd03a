"""What stands in the sets of the bridge's packet filter."""

from __future__ import annotations

from cloister.host.bridge_filter import elements
from cloister.plan.bridge import Tap


def tap(number: int, port: int, uid: int = 1000) -> Tap:
    """Return a guest."""
    return Tap(
        name=f"clvm{number}", mac=f"52:54:00:00:00:{number:02x}", own_mac=f"06:c1:00:00:00:{number:02x}",
        address=f"10.0.0.{number}", gateway="10.0.0.1", port=port, uid=uid, run=f"r{number}",
    )  # fmt: skip


def test_a_guest_stands_in_each_set_as_a_whole() -> None:
    """Tap, MAC, both addresses and the port hang together: no part of one guest's fits to another's."""
    found = elements((tap(7, 4000), tap(9, 4001, 1001)), "10.0.0.1")

    assert found["bridge", "talks"] == {
        ("clvm7", "52:54:00:00:00:07", "10.0.0.7", "10.0.0.1", "4000"),
        ("clvm9", "52:54:00:00:00:09", "10.0.0.9", "10.0.0.1", "4001"),
    }
    assert ("clvm7", "52:54:00:00:00:07", "52:54:00:00:00:07", "10.0.0.7", "10.0.0.1") in found["bridge", "knows"]
    assert found["inet", "reaches"] == {("10.0.0.7", "10.0.0.1", "4000"), ("10.0.0.9", "10.0.0.1", "4001")}
    assert found["inet", "listeners"] == {("1000", "10.0.0.1", "4000"), ("1001", "10.0.0.1", "4001")}
    assert found["inet", "gateways"] == {("10.0.0.1",)}


def test_without_guests_nothing_passes() -> None:
    """Every set is empty, and yet named: what the kernel has is compared with it."""
    assert len(found := elements(())) == 5  # sets
    assert not any(found.values())
