"""Unit files of the packet filter and of its watchdog, as text.

The filter is loaded by nft itself, before the network and without Python: it must be there when
anything else fails. Stopping that unit takes nothing away. The watchdog is what units that
share the host's network are bound to: `BOUND` are the properties they need. Installing is for `host`.
"""

from __future__ import annotations

from cloister.isolation.daemon_units import CONFINED
from cloister.plan.firewall import FILE, FIREWALL_UNIT, WATCHDOG_UNIT
from cloister.plan.unit import RUNTIME, STATE

BOUND: tuple[tuple[str, str], ...] = (("BindsTo", WATCHDOG_UNIT), ("After", WATCHDOG_UNIT))
"""Properties of every unit that shares the host's network: it starts after the watchdog has found the filter whole,
and ends with the watchdog (systemd.unit(5))."""

HARDENED = f"""\
{CONFINED}CapabilityBoundingSet=CAP_NET_ADMIN
UMask=0077
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
IPAddressDeny=any
"""


def firewall_unit(nft: str) -> str:
    """Return `cloister-firewall.service`: it loads the table at boot, by this nft(8), before any network is up.

    Ordered as Debian's nftables.service is, and behind it, since its file begins with `flush ruleset`; restarted
    with it for the same reason.
    """
    return f"""\
# Made by cloister apply; changes here are overwritten.
[Unit]
Description=Cloister: packet filter of the agents' accounts
Documentation=man:cloister(1)
DefaultDependencies=no
RequiresMountsFor={STATE}
Wants=network-pre.target
After=nftables.service
PartOf=nftables.service
Before=network-pre.target shutdown.target
Conflicts=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
StandardInput=null
ExecStart={nft} -f {FILE}
ExecReload={nft} -f {FILE}
RestrictAddressFamilies=AF_NETLINK
{HARDENED}
[Install]
WantedBy=sysinit.target
"""


def watchdog_unit(python: str) -> str:
    """Return `cloister-watchdog.service`, run by this interpreter.

    What a listing must look like is found out before it starts, with all of root's rights, in a network namespace of
    its own (`+`); the watchdog itself can make none, and asks for a reload when nft has become another.
    """
    return f"""\
# Made by cloister apply; changes here are overwritten.
[Unit]
Description=Cloister: watchdog of the packet filter
Documentation=man:cloister(1)
Wants={FIREWALL_UNIT}
After={FIREWALL_UNIT}
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStartPre=+{python} -I -m cloister.services.watchdog --expect
ExecStart={python} -I -m cloister.services.watchdog
ExecReload=+{python} -I -m cloister.services.watchdog --expect
Restart=always
RestartSec=2
WatchdogSec=30
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
