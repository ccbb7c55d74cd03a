"""Making the bridge of microVMs, moving it out of the way of this host's own networks, and taking it away.

It forwards nothing, has no IPv6, and its packet filter is loaded before it comes up. Its network is the policy's, or
the first alternative that this host has no interface or route for; it moves only while no guest is on it. Root only.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from cloister.errors import CloisterError, StepError
from cloister.host import bridge_filter, taps
from cloister.host.rtnetlink import Rtnetlink
from cloister.plan.bridge import (
    BRIDGE,
    EXPECTED,
    MAC,
    NETWORK_FILE,
    PLACE,
    PREFIX,
    TAPS,
    Network,
    Tap,
    choose_network,
)


def bring_up(wanted: str) -> Network:
    """Have the bridge there, with its filter and whatever guests it has; return where it is.

    Args:
        wanted: the network of the policy.

    Raises:
        StepError: every network is taken, the kernel refuses, or the filter is not loaded.
    """
    os.makedirs(PLACE, mode=0o755, exist_ok=True)
    os.chmod(PLACE, 0o755)  # noqa: S103  # everybody may read where the bridge is
    with taps.locked(), Rtnetlink() as kernel:
        try:
            guests = taps.reconcile(kernel)
            index = _interface(kernel)
            network = _network(kernel, index, wanted, guests)
            bridge_filter.load(guests, network.gateway)
            _have_address(kernel, index, network)
            _write(network)
            kernel.set_up(index)
            for guest in guests:
                kernel.add_neighbour(index, guest.address, guest.mac)  # going down has made the kernel forget them
        except OSError as error:
            message = f"the kernel refused the bridge of microVMs: {error.strerror}"
            raise StepError("bridge-not-made", message, where=BRIDGE) from error
        return network


def trouble(wanted: str) -> str:
    """Return in one sentence what is wrong with bridge and filter; empty when all is well.

    Guests that left are forgotten by that. A network that collides now counts only while no guest is there.
    """
    try:
        with taps.locked(), Rtnetlink() as kernel:
            guests, network = taps.reconcile(kernel), taps.read_network()
            link = kernel.link(BRIDGE)
            if link is None or not link.up or link.mac != MAC:
                return "the bridge of microVMs is gone, or not what it was"
            if (link.number, f"{network.gateway}/{PREFIX}") not in kernel.addresses():
                return "the bridge of microVMs has lost its address"
            best = _best(kernel, link.number, wanted)
            if not guests and best.network != network.network:
                return f"the network {network.network} is used elsewhere on this host, or free again"
            _note_collision(network, best)
            return bridge_filter.trouble(guests, network.gateway)
    except CloisterError as error:
        return str(error)
    except OSError as error:
        return f"the bridge of microVMs cannot be looked at: {error}"


def shut() -> None:
    """Take the bridge down at once: nothing passes. What is on it stays."""
    with contextlib.suppress(OSError), Rtnetlink() as kernel:
        if link := kernel.link(BRIDGE):
            kernel.set_up(link.number, up=False)


def remove() -> None:
    """Take everything away: taps, bridge, filter, records.

    Raises:
        StepError: the kernel refuses.
    """
    try:
        with Rtnetlink() as kernel:
            for link in kernel.links():
                if link.name == BRIDGE or link.name in {tap.name for tap in taps.read_taps()}:
                    kernel.delete(link.number)
    except OSError as error:
        raise StepError("bridge-not-removed", f"the kernel refused: {error.strerror}", where=BRIDGE) from error
    bridge_filter.unload()
    for tap in taps.read_taps():
        os.unlink(f"{TAPS}/{tap.name}")
    for path in (NETWORK_FILE, EXPECTED):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _interface(kernel: Rtnetlink) -> int:
    link = kernel.link(BRIDGE)
    if link is not None and (link.mac, link.kind) != (MAC, "bridge"):
        message = "there is an interface of that name that Cloister did not make"
        raise StepError("not-ours", message, where=BRIDGE, remedy=f"ip link delete {BRIDGE}")
    if link is None:
        kernel.make_bridge(BRIDGE, MAC)
        link = kernel.link(BRIDGE)
    if link is None:
        raise StepError("bridge-not-made", "the bridge was gone at once", where=BRIDGE)
    kernel.quieten(link.number)
    return link.number


def _network(kernel: Rtnetlink, index: int, wanted: str, guests: tuple[Tap, ...]) -> Network:
    if guests:
        with contextlib.suppress(CloisterError):
            return taps.read_network()  # it moves when nobody is on it
    return _best(kernel, index, wanted)


def _best(kernel: Rtnetlink, index: int, wanted: str) -> Network:
    there = [address for interface, address in kernel.addresses() if interface != index]
    there += [route.network for route in kernel.routes() if route.interface != index]
    try:
        return choose_network(wanted, there)
    except ValueError as error:
        remedy = '[microvm] bridge = "ANOTHER/24" in the system\'s policy'
        raise StepError("bridge-collides", str(error), where=BRIDGE, remedy=remedy) from error


def _note_collision(network: Network, best: Network) -> None:
    """Write down that the bridge must move when its guests have left, or that it need not any more."""
    met = best.taken_by if best.network != network.network else network.taken_by
    if network.network == network.wanted and best.network == network.network:
        met = ""
    if met != network.taken_by:
        _write(msgspec.structs.replace(network, taken_by=met))


def _have_address(kernel: Rtnetlink, index: int, network: Network) -> None:
    own = f"{network.gateway}/{PREFIX}"
    for interface, address in kernel.addresses():
        if interface == index and address != own:
            kernel.delete_address(index, address)
    kernel.add_address(index, own)


def _write(network: Network) -> None:
    partial = f"{NETWORK_FILE}.new"
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(msgspec.json.encode(network))
    os.rename(partial, NETWORK_FILE)
