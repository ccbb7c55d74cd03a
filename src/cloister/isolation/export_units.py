"""The unit that sends the system's audit log elsewhere, as text; there is one only where `[audit]` names a receiver.

A user of its own, which may read the log by its group: it needs the network, and so must be nobody who can write the
log, see keys, or be asked by agents. Files of root's (authorities, a certificate with its key) reach it by
systemd's LoadCredential=.

Sources: systemd.exec(5), systemd.service(5), systemd.unit(5) for `%d`.
"""

from __future__ import annotations

from cloister.isolation.daemon_units import CONFINED
from cloister.isolation.unit_files import AUDITD, UNITS, DaemonFacts, word
from cloister.plan.system_diff import HEAD, Wanted
from cloister.plan.unit import AGENTS, AUDIT_KEYS, AUDIT_LOG, AUDIT_USER, EXPORT_STATE, EXPORT_USER, PROXY_STATE
from cloister.policy.model import Audit

EXPORT = "cloister-audit-export"
SERVICE = f"{UNITS}/{EXPORT}.service"
_FILES = ("ca", "certificate")
_HARDENING = f"""\
{CONFINED}CapabilityBoundingSet=
InaccessiblePaths=-{AGENTS} -{PROXY_STATE} -{AUDIT_KEYS}
ProcSubset=pid
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
RemoveIPC=yes
TasksMax=16
MemoryMax=256M
"""


def is_wanted(audit: Audit) -> bool:
    """Whether events are sent anywhere."""
    return bool(audit.syslog or audit.otlp or audit.alarm)


def export_service(facts: DaemonFacts, audit: Audit) -> str:
    """Return the text of the service; receivers and formats of `[audit]` are its words."""
    words = [f"--log {AUDIT_LOG}", f"--cursors {EXPORT_STATE}", f"--format {audit.format}"]
    words += [f"--{key} {word(value)}" for key in ("syslog", "otlp") if (value := getattr(audit, key))]
    words += [f"--{key} %d/{key}" for key in _FILES if getattr(audit, key)]
    hook = audit.alarm.removeprefix("file:") if audit.alarm.startswith("file:") else ""
    words += [f"--alarm {'file:%d/alarm' if hook else word(audit.alarm)}"] if audit.alarm else []
    loaded = f"LoadCredential={word(f'alarm:{hook}')}\n" if hook else ""
    loaded += "".join(f"LoadCredential={word(f'{key}:{path}')}\n" for key in _FILES if (path := getattr(audit, key)))
    return f"""{HEAD}[Unit]
Description=Send the audit log (Cloister)
Documentation=man:cloister-audit(1)
Wants=network-online.target
After=network-online.target nss-lookup.target {AUDITD}.service
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={word(facts.python)} -I -m cloister.services.audit_export {" ".join(words)}
User={EXPORT_USER}
Group={EXPORT_USER}
SupplementaryGroups={AUDIT_USER}
WorkingDirectory=/
UMask=0077
StateDirectory={EXPORT_STATE.removeprefix("/var/lib/")}
StateDirectoryMode=0700
{loaded}Restart=always
RestartSec=5
TimeoutStopSec=30
{_HARDENING}
[Install]
WantedBy=multi-user.target
"""


def export_units(facts: DaemonFacts, audit: Audit) -> dict[str, str]:
    """Return the unit: path and text; nothing where events are sent nowhere."""
    return {SERVICE: export_service(facts, audit)} if is_wanted(audit) else {}


def export_wanted(audit: Audit) -> tuple[Wanted, ...]:
    """Return how it shall be."""
    return (Wanted(unit=f"{EXPORT}.service", restart_for=(SERVICE,)),) if is_wanted(audit) else ()
