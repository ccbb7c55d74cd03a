"""A guest's network card: the run's addresses, and nothing else on the wire."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from support import guest_machine
from support.guest_link import GuestLink, fields
from support.guest_machine import GuestMachine, line

MAC, ADDRESS, GATEWAY = "02:00:00:00:00:07", "10.0.0.7", "10.0.0.1"
ARP = b"\x08\x06"
CONNECT = f"import socket; s=socket.socket(); s.setblocking(False); s.connect_ex(('{GATEWAY}', 80))"


def frames(machine: GuestMachine, seconds: float) -> Iterator[bytes]:
    """Yield what the guest sends within this time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        machine.wire.settimeout(left)
        try:
            yield machine.wire.recv(4096)
        except TimeoutError:
            return


def test_the_card_has_the_runs_addresses(image) -> None:
    """The guest asks for its gateway with its own MAC and address, and sends no IPv6, DHCP or anything unasked."""
    booted = guest_machine.of(image)
    with GuestMachine(booted, line(booted), mac="02:00:00:00:00:99") as machine:
        link = GuestLink(machine.channel)
        link.join()
        link.begin(fields(address=f"{ADDRESS}/24", gateway=GATEWAY, mac=MAC, proxy=f"{GATEWAY}:3128"))
        assert link.run("cat", "/sys/class/net/eth0/address").out.strip() == MAC
        assert "eth0" not in link.run("cat", "/proc/net/if_inet6").out
        assert all(frame[12:14] == ARP for frame in frames(machine, 2)), "nothing was asked for yet"
        assert link.run("python3", "-c", CONNECT).status == 0
        asked = next(frame for frame in frames(machine, guest_machine.PATIENCE) if frame[12:14] == ARP)
    own = bytes.fromhex(MAC.replace(":", ""))
    assert asked[6:12] == asked[22:28] == own
    assert asked[28:32] == socket.inet_aton(ADDRESS)
    assert asked[38:42] == socket.inet_aton(GATEWAY)
