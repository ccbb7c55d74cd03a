"""The unit of the sensor of kernel events, as text. It is root's, with the three capabilities that BPF programs need.

It reads no event and writes no file; what it holds are the programs and the rings. It is stopped last and restarted
when it ends, since nothing is seen without it.

Sources: systemd.exec(5), capabilities(7), bpf(2).
"""

from __future__ import annotations

from cloister.isolation.daemon_units import CONFINED
from cloister.isolation.unit_files import UNITS, DaemonFacts, word
from cloister.plan.system_diff import HEAD, Wanted
from cloister.plan.unit import AUDIT_USER, RUNTIME
from cloister.policy.model import Audit

SENSOR = "cloister-sensor"
SENSOR_SOCKET = f"{RUNTIME}/sensor.sock"
SERVICE = f"{UNITS}/{SENSOR}.service"
CAPABILITIES: tuple[tuple[str, str], ...] = (
    ("CAP_BPF", "makes maps and loads programs"),
    ("CAP_PERFMON", "lets programs read the kernel's objects and attach to tracepoints, fentry and LSM hooks"),
    ("CAP_NET_ADMIN", "attaches programs to cgroups"),
)
"""Everything else of root is taken away from the sensor; tests take each of these away as well, and look what fails."""
_NAMES = " ".join(name for name, _ in CAPABILITIES)
_HARDENING = f"""\
{CONFINED}CapabilityBoundingSet={_NAMES}
ReadWritePaths={RUNTIME}
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
IPAddressDeny=any
SystemCallFilter=@system-service bpf perf_event_open
LimitMEMLOCK=infinity
TasksMax=32
"""


def sensor_service(facts: DaemonFacts, audit: Audit) -> str:
    """Return the text of the unit; `audit.syscalls` is its word."""
    words = f"--socket {SENSOR_SOCKET} --keeper {AUDIT_USER} --calls {audit.syscalls}"
    return f"""{HEAD}[Unit]
Description=See what agents do in the kernel (Cloister)
Documentation=man:cloister(1)
Before=cloister-auditd.service cloister-hostd.service cloister-proxyd.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={word(facts.python)} -I -m cloister.services.sensor {words}
WorkingDirectory=/
UMask=0077
Restart=always
RestartSec=1
WatchdogSec=30
TimeoutStartSec=60
TimeoutStopSec=10
OOMScoreAdjust=-900
FileDescriptorStoreMax=512
{_HARDENING}
[Install]
WantedBy=multi-user.target
"""


def sensor_units(facts: DaemonFacts, audit: Audit) -> dict[str, str]:
    """Return the sensor's unit: path and text."""
    return {SERVICE: sensor_service(facts, audit)}


def sensor_wanted() -> tuple[Wanted, ...]:
    """Return how it shall be."""
    return (Wanted(unit=f"{SENSOR}.service", restart_for=(SERVICE,)),)
