"""The units of the system's keeper of the audit log, as texts: its socket, and the service behind it.

The service has a user of its own, no capability, no network and nothing to write to but its log and its key. It is
restarted whenever it ends, by systemd's watchdog too where it hangs; meanwhile the socket stands, and sources wait.

Sources: systemd.exec(5), systemd.socket(5), systemd.service(5).
"""

from __future__ import annotations

from cloister.isolation.daemon_units import CONFINED
from cloister.isolation.unit_files import AUDITD, UNITS, DaemonFacts, word
from cloister.plan.system_diff import HEAD, Wanted
from cloister.plan.unit import AGENTS, AUDIT_KEYS, AUDIT_LOG, AUDIT_SOCKET, AUDIT_USER, PROXY_STATE
from cloister.policy.model import Audit

SOCKET, SERVICE = f"{UNITS}/{AUDITD}.socket", f"{UNITS}/{AUDITD}.service"
_HARDENING = f"""\
{CONFINED}CapabilityBoundingSet=
InaccessiblePaths=-{AGENTS} -{PROXY_STATE}
PrivateNetwork=yes
ProcSubset=all
RestrictAddressFamilies=AF_UNIX
IPAddressDeny=any
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
RemoveIPC=yes
LimitNOFILE=4096
TasksMax=64
MemoryMax=512M
"""


def auditd_socket() -> str:
    """Return the text of the socket that everybody may report to: who they are is the kernel's word."""
    return f"""{HEAD}[Unit]
Description=Take what agents did on record (Cloister)
Documentation=man:cloister(1)

[Socket]
ListenStream={AUDIT_SOCKET}
SocketMode=0666
DirectoryMode=0755
Backlog=512
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""


def auditd_service(facts: DaemonFacts, audit: Audit) -> str:
    """Return the text of the keeper; sizes and times of `[audit]` are its words."""
    words = f"--rotate-size {audit.rotate_size} --rotate-every {audit.rotate_every} --retention {audit.retention}"
    return f"""{HEAD}[Unit]
Description=Keep the audit log (Cloister)
Documentation=man:cloister(1)
Requires={AUDITD}.socket
After={AUDITD}.socket
# Never given up: without it agents stop.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={word(facts.python)} -I -m cloister.services.auditd {words}
User={AUDIT_USER}
Group={AUDIT_USER}
WorkingDirectory=/
UMask=0027
# The log may be read by its group; the key by nobody else.
LogsDirectory={AUDIT_LOG.removeprefix("/var/log/")}
LogsDirectoryMode=0750
StateDirectory={AUDIT_KEYS.removeprefix("/var/lib/")}
StateDirectoryMode=0700
Restart=always
RestartSec=300ms
WatchdogSec=15
TimeoutStopSec=10
OOMScoreAdjust=-900
{_HARDENING}
[Install]
WantedBy=multi-user.target
"""


def audit_units(facts: DaemonFacts, audit: Audit) -> dict[str, str]:
    """Return the keeper's units: path and text."""
    return {SOCKET: auditd_socket(), SERVICE: auditd_service(facts, audit)}


def audit_wanted() -> tuple[Wanted, ...]:
    """Return how they shall be; stopped in the opposite order, since a report would start the service again."""
    return (
        Wanted(unit=f"{AUDITD}.service", restart_for=(SERVICE,)),
        Wanted(unit=f"{AUDITD}.socket", restart_for=(SOCKET,)),
    )
