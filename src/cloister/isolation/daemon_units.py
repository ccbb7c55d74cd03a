"""What every daemon of ours gives up, as lines of its unit: one list, so that none of them is forgotten.

A unit's own file adds what differs: capabilities, address families, system calls, paths and numbers.

Sources: systemd.exec(5), systemd.resource-control(5).
"""

from __future__ import annotations

GIVEN_UP = """\
NoNewPrivileges=yes
AmbientCapabilities=
ProtectClock=yes
SystemCallErrorNumber=EPERM
SystemCallArchitectures=native
RestrictRealtime=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
KeyringMode=private
DevicePolicy=closed
Delegate=no
LimitCORE=0
"""
"""Without any effect on mounts, so that it suits the one daemon that works in other mount namespaces, too."""

CONFINED = f"""\
{GIVEN_UP}ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateIPC=yes
ProtectProc=invisible
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictNamespaces=yes
RestrictSUIDSGID=yes
"""
"""Of daemons that need nothing of the host but their own directories."""
