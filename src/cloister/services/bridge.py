"""The bridge of microVMs: made at boot with its packet filter, and held to what it shall be.

`python -I -m cloister.services.bridge`. It hears of every change of interfaces, addresses, routes and packet filters. A
guest that left is forgotten at once; a tap that was tampered with is deleted. When the filter is not what was loaded,
the bridge goes down first, and comes up again with a new one: nothing passes meanwhile. A network that the host meets
elsewhere is left for another one, once no guest is on it. If it cannot be had, the bridge stays down and this ends.

This process is root with CAP_NET_ADMIN only.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from types import FrameType

from cloister.errors import CloisterError, render
from cloister.host import audit_send, bridge, bridge_filter
from cloister.host.netlink import Changes
from cloister.host.notify import notify
from cloister.host.rtnetlink import drain, listen
from cloister.plan.bridge import BRIDGE, DEFAULT_NETWORK, TABLE, Network

LOOK_S = 20.0
"""It looks this often also when nothing was heard."""
_CRITICAL, _ERROR, _NOTICE = "<2>", "<3>", "<5>"


def main(words: list[str]) -> int:
    """Watch until SIGTERM; return 1 when the bridge cannot be had.

    The one word is the network that is wanted; with `--expect` it is only noted what the filter must look like, with
    `--shut` the bridge only goes down.
    """
    try:
        if words == ["--expect"]:
            bridge_filter.expect()
            return 0
        if words == ["--shut"]:
            bridge.shut()
            return 0
        return _watch(words[0] if words else DEFAULT_NETWORK)
    except CloisterError as error:
        bridge.shut()
        _say(_ERROR, render(error).replace("\n", "; "))
    except OSError as error:
        bridge.shut()
        _say(_ERROR, f"cloister: the bridge of microVMs cannot be watched: {error}")
    return 1


def _watch(wanted: str) -> int:
    stopped, stop = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def end(_signal: int, _frame: FrameType | None) -> None:
        os.write(stop, b"\0")

    signal.signal(signal.SIGTERM, end)
    filters, links = Changes(), listen()  # before the first look, so that nothing falls between
    _tell(bridge.bring_up(wanted))
    notify("READY=1")
    while True:
        ready, _, _ = select.select([filters.fileno(), links.fileno(), stopped], [], [], LOOK_S)
        if stopped in ready:
            return 0
        heard = not ready
        if links.fileno() in ready:
            drain(links)
            heard = True
        if filters.fileno() in ready:
            heard = filters.concern(TABLE) or heard
        if heard:
            _mend(wanted)
        notify("WATCHDOG=1")


def _mend(wanted: str) -> None:
    """Look, and put right what is not.

    Raises:
        CloisterError: it cannot be.
    """
    began = time.monotonic()
    why = bridge.trouble(wanted)
    if not why:
        return
    bridge.shut()
    _say(_CRITICAL, f"cloister: {why}; {BRIDGE} is down until that is mended")
    _tell(bridge.bring_up(wanted))
    _say(_NOTICE, f"cloister: {BRIDGE} is up again after {(time.monotonic() - began) * 1000:.0f} ms")
    event = audit_send.event("firewall.changed", "bridge", {"interface": BRIDGE}, message=why[:1024], severity_id=4)
    if trouble := audit_send.report(event):
        _say(_ERROR, f"cloister: this is not in the audit log: {trouble}")


def _tell(network: Network) -> None:
    if network.network != network.wanted:
        _say(_NOTICE, f"cloister: {BRIDGE} is {network.describe()}")


def _say(level: str, text: str) -> None:
    """Write a line for the journal."""
    print(f"{level}{text}", file=sys.stderr, flush=True)  # noqa: T201  # the journal reads it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
