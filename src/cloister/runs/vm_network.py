"""A microVM on the system's bridge: asked for before the launch, served by the run's own egress server.

The run's identity is its listener, as it is its Unix socket elsewhere: the packet filter lets one guest reach it. The
address that a connection comes from is looked at once more here. Closing takes both ends away.
"""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial

from cloister.host import tap_client
from cloister.plan.bridge import NETWORK_FILE, Tap, interface_of
from cloister.plan.unit import HOSTD_SOCKET
from cloister.relay.server import EgressServer


class GuestNetwork:
    """What one guest has on the bridge."""

    def __init__(self, given: tap_client.Given) -> None:
        """Take both descriptors over."""
        self.tap: Tap = given.tap
        self._device = given.device
        self._listener: socket.socket | None = given.listener

    @property
    def device(self) -> int:
        """The tap, for the monitor (`-netdev tap,fd=N,vhost=off`, `mac=` of the device is `tap.mac`); -1 when lent."""
        return self._device

    def lent(self) -> None:
        """Say that the monitor has the tap: ours is closed, so that the tap ends with the monitor."""
        if self._device >= 0:
            os.close(self._device)
        self._device = -1

    def fields(self) -> tuple[str, ...]:
        """Return what the guest is told in `B`: no gateway, so that what leads elsewhere fails at once in there."""
        return (f"address={interface_of(self.tap)}", f"mac={self.tap.mac}")

    def proxy(self) -> str:
        """Return the run's proxy on the bridge, as a URL; inside, 127.0.0.1:3128 is the same."""
        return f"http://{self.tap.gateway}:{self.tap.port}"

    async def serve(self, egress: EgressServer) -> None:
        """Have the run's egress server answer on the bridge too, until that is closed."""
        if self._listener:
            listener, self._listener = self._listener, None
            await egress.start_for(listener, self.tap.address)

    def close(self) -> None:
        """Give the place up; hostd takes back the rest."""
        self.lent()
        if self._listener:
            self._listener.close()


async def join(
    loop: asyncio.AbstractEventLoop, run: str, hostd: str = HOSTD_SOCKET, network: str = NETWORK_FILE
) -> GuestNetwork:
    """Return a place on the bridge for the guest of a run.

    Raises:
        UnsupportedError: `bridge-needs-setup`.
        RetryError: `tap-refused`: not granted, too many, or hostd does not answer.
    """
    return GuestNetwork(await loop.run_in_executor(None, partial(tap_client.ask, run, hostd, network)))
