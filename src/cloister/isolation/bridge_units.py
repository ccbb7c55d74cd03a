"""The unit file of the bridge of microVMs, as text.

One small daemon with CAP_NET_ADMIN makes the bridge at boot, with its filter before it is up, and watches both.
When it ends, in whatever way, the bridge goes down until it is back. Installing is for `host`.
"""

from __future__ import annotations

from cloister.isolation.firewall_units import HARDENED
from cloister.plan.bridge import FILE, UNIT
from cloister.plan.system_diff import Wanted
from cloister.plan.unit import RUNTIME, STATE

PATH = f"/etc/systemd/system/{UNIT}"


def bridge_unit(python: str, network: str) -> str:
    """Return `cloister-bridge.service`, run by this interpreter, for the network that the policy wants.

    What a listing of the filter must look like is found out before it starts, with all of root's rights, in a network
    namespace of its own (`+`): the daemon can make none.
    """
    return f"""\
# Made by cloister apply; changes here are overwritten.
[Unit]
Description=Cloister: bridge of microVMs
Documentation=man:cloister(1)
RequiresMountsFor={STATE}
After=network-pre.target nftables.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStartPre=+{python} -I -m cloister.services.bridge --expect
ExecStart={python} -I -m cloister.services.bridge {network}
# Without anybody to watch its filter the bridge is down, and what is on it waits.
ExecStopPost={python} -I -m cloister.services.bridge --shut
Restart=always
RestartSec=100ms
WatchdogSec=60
TimeoutStartSec=60
TimeoutStopSec=5
StandardInput=null
OOMScoreAdjust=-900
ReadWritePaths={RUNTIME}
RestrictAddressFamilies=AF_NETLINK AF_UNIX
{HARDENED}
[Install]
WantedBy=multi-user.target
"""


def bridge_wanted() -> Wanted:
    """Return how the unit shall be: a new filter is loaded by starting it again."""
    return Wanted(unit=UNIT, restart_for=(PATH, FILE))
