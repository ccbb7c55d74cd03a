"""Taps on the bridge of microVMs: making one for a guest, writing it down, taking back what is gone.

A tap is not persistent: it lives as long as somebody holds its descriptor, and whoever holds that can change little of
it. What is recorded is compared with the kernel's at each request and whenever an interface changes: a guest without
its tap loses its place in the filter, a tap that was tampered with (another MAC, made persistent, out of the bridge) is
deleted. One process at a time, by a lock that dies with it. Root only (CAP_NET_ADMIN).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import struct
from collections.abc import Iterator

import msgspec

from cloister.errors import RetryError, StepError, UnsupportedError
from cloister.host import bridge_filter
from cloister.host.rtnetlink import Link, Rtnetlink
from cloister.plan.bridge import (
    BRIDGE,
    MOST_TAPS,
    NETWORK_FILE,
    PLACE,
    TAP_PREFIX,
    TAPS,
    UNIT,
    Network,
    Tap,
    address_of,
    free_numbers,
    guest_mac,
)

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOWNER = 0x400454CA, 0x400454CC
_TAP, _NO_PI, _PERSIST = 0x0002, 0x1000, 0x0800
_IFREQ = struct.Struct("16sH22x")
_MAC_RANDOM = 4


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Be the only one who changes taps.

    Raises:
        UnsupportedError: `bridge-missing`: there is no bridge since this boot.
    """
    try:
        descriptor = os.open(PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise missing() from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def missing() -> UnsupportedError:
    """Return what is said where there is no bridge."""
    return UnsupportedError(
        "bridge-missing", "the bridge of microVMs is not there", where=BRIDGE,
        remedy=f"systemctl status {UNIT}; sudo cloister apply",
    )  # fmt: skip


def read_network(path: str = NETWORK_FILE) -> Network:
    """Return where the bridge is.

    Raises:
        UnsupportedError: `bridge-missing`.
    """
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Network)
    except (OSError, msgspec.DecodeError):
        raise missing() from None


def read_taps() -> tuple[Tap, ...]:
    """Return all that are written down, by name."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(TAPS)):
            with contextlib.suppress(OSError, msgspec.DecodeError), open(f"{TAPS}/{name}", "rb") as file:
                found.append(msgspec.json.decode(file.read(), type=Tap))
    return tuple(found)


def make(uid: int, run: str, port: int) -> tuple[Tap, int]:
    """Make a tap for a guest of this user, whose run listens on this port; return it with its descriptor.

    Raises:
        RetryError: `too-many-taps` of this user, or no address is free.
        UnsupportedError: there is no bridge, or no tun device.
        StepError: the packet filter is not what it should be, or the kernel refuses.
    """
    with locked(), Rtnetlink() as kernel:
        network, bridge = read_network(), kernel.link(BRIDGE)
        if bridge is None:
            raise missing()
        there = reconcile(kernel)
        if why := bridge_filter.trouble(there, network.gateway):
            raise StepError("bridge-filter-lost", why, remedy=f"systemctl restart {UNIT}")
        tap = _allocate(network, there, (uid, run, port))
        _write(tap)
        try:
            return tap, _connect(kernel, tap, bridge)
        except OSError as error:
            raise StepError("tap-not-made", f"the kernel refused a tap: {error.strerror}", where=tap.name) from error
        finally:
            reconcile(kernel)


def reconcile(kernel: Rtnetlink) -> tuple[Tap, ...]:
    """Take back what belongs to no tap, delete taps that are not as they were made; return those that are well."""
    links = kernel.links()
    bridge = next((link for link in links if link.name == BRIDGE), None)
    ours = {link.name: link for link in links if link.name.startswith(TAP_PREFIX)}
    well = []
    for tap in read_taps():
        link = ours.get(tap.name)
        if bridge and link and _intact(tap, link, bridge):
            well.append((tap, link))
            del ours[tap.name]
    for stray in ours.values():
        with contextlib.suppress(OSError):  # it may have ended by itself meanwhile
            kernel.delete(stray.number)
    for tap, link in well:
        with contextlib.suppress(OSError):  # one that took another's MAC has made the bridge forget where that is
            kernel.add_station(link.number, tap.mac)
    there = tuple(tap for tap, _ in well)
    for tap in read_taps():
        if tap not in there:
            _forget(kernel, tap, there, bridge.number if bridge else 0)
    return there


def _allocate(network: Network, there: tuple[Tap, ...], asked: tuple[int, str, int]) -> Tap:
    uid, run, port = asked
    if sum(tap.uid == uid for tap in there) >= MOST_TAPS:
        message = f"you have {MOST_TAPS} guests on the bridge already"
        raise RetryError("too-many-taps", message, remedy="cloister ps; cloister stop RUN")
    free = free_numbers(network.network, (tap.address for tap in there))
    if not free:
        raise RetryError("bridge-full", f"no address of {network.network} is free", remedy="cloister ps")
    number = secrets.choice(free)
    mac, macs = guest_mac(uid, run), {mac for tap in there for mac in (tap.mac, tap.own_mac)}
    if mac in macs:
        raise RetryError("too-many-taps", "there is a guest of this run on the bridge already", remedy="cloister ps")
    return Tap(
        name=f"{TAP_PREFIX}{number}", mac=mac, own_mac=_new_mac("06:c1", macs),
        address=address_of(network.network, number), gateway=network.gateway, port=port, uid=uid, run=run,
    )  # fmt: skip


def _new_mac(head: str, taken: set[str]) -> str:
    while True:
        found = f"{head}:{secrets.token_bytes(_MAC_RANDOM).hex(':')}"
        if found not in taken:
            return found


def _connect(kernel: Rtnetlink, tap: Tap, bridge: Link) -> int:
    """Make the device, let it through the filter, and only then bring it up; return its descriptor."""
    descriptor = _open(tap)
    try:
        link = _made(kernel, tap)
        kernel.set_mac(link.number, tap.own_mac)
        kernel.quieten(link.number)
        kernel.add_port(link.number, bridge.number)
        kernel.add_station(link.number, tap.mac)
        kernel.add_neighbour(bridge.number, tap.address, tap.mac)
        bridge_filter.add(tap)
        kernel.set_up(link.number)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _made(kernel: Rtnetlink, tap: Tap) -> Link:
    link = kernel.link(tap.name)
    if link is None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return link


def _open(tap: Tap) -> int:
    """Return a tap of plain frames: without IFF_VNET_HDR no guest can hand its host's kernel half-made segments."""
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        message = f"taps cannot be made: {error.strerror}"
        raise UnsupportedError("no-tun", message, where=_TUN, remedy="sudo modprobe tun") from error
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(tap.name.encode(), _TAP | _NO_PI))
        fcntl.ioctl(descriptor, _TUNSETOWNER, tap.uid)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _intact(tap: Tap, link: Link, bridge: Link) -> bool:
    """Whether a tap is as it was made: its holder can change its MAC, and that it outlives its descriptor."""
    alone = link.isolated and not link.learning and link.master == bridge.number
    return alone and link.kind == "tun" and link.mac == tap.own_mac and not link.persistent


def _write(tap: Tap) -> None:
    os.makedirs(TAPS, mode=0o700, exist_ok=True)
    path = f"{PLACE}/tap.new"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(tap))
    os.rename(path, f"{TAPS}/{tap.name}")


def _forget(kernel: Rtnetlink, tap: Tap, others: tuple[Tap, ...], bridge: int) -> None:
    """Take a guest out of the filter and the neighbours; its record goes last."""
    with contextlib.suppress(StepError):  # it had not got so far, or somebody flushed the filter
        bridge_filter.remove(tap, others)
    if bridge and tap.address not in {other.address for other in others}:
        with contextlib.suppress(OSError):
            kernel.delete_neighbour(bridge, tap.address)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{TAPS}/{tap.name}")
