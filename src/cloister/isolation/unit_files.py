"""The texts that make Cloister a part of a system: units of its daemons, users, and the tree that units start in.

Pure: values in, texts out. Units of the packet filter are in `firewall_units`, those of gateways in `service_units`;
the properties of runs are no files (`unit`). What is loosened stands beside its reason, in the files themselves too.

Sources: systemd.exec(5), systemd.socket(5), sysusers.d(5), tmpfiles.d(5), capabilities(7); versions 252 to 258.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping

import msgspec

from cloister.isolation.daemon_units import CONFINED, GIVEN_UP
from cloister.plan.system_diff import HEAD, Directory, Link
from cloister.plan.unit import (
    AGENTS,
    DAEMON_USERS,
    ETC,
    HOSTD_SOCKET,
    PROXY_RUNTIME,
    PROXY_STATE,
    PROXY_USER,
    PROXYD_SOCKET,
    RUNTIME,
    SKELETON,
    SLICE,
    STATE,
    Account,
)

AUDITD = "cloister-auditd"
HOSTD = "cloister-hostd"
PROXYD = "cloister-proxyd"
SERVICES = f"{STATE}/services"
KEYS = f"{ETC}/keys"
SYSUSERS = "/etc/sysusers.d/cloister.conf"
TMPFILES = "/etc/tmpfiles.d/cloister.conf"
UNITS = "/etc/systemd/system"

HOSTD_CAPABILITIES: tuple[tuple[str, str], ...] = (
    ("CAP_SYS_ADMIN", "mounts a workspace into a unit: open_tree(2), mount_setattr(2), move_mount(2), setns(2)"),
    ("CAP_SYS_CHROOT", "setns(2) into a mount namespace asks for it too"),
    ("CAP_SYS_PTRACE", "opens /proc/PID/ns and /proc/PID/root of a unit's process, to mount and to look at what came"),
    ("CAP_SETUID", "looks at the caller's directories with the caller's rights; maps ids for mounts"),
    ("CAP_SETGID", "the same, for groups"),
    ("CAP_CHOWN", "gives an agent's new state directory to its account"),
    ("CAP_DAC_OVERRIDE", "enters state directories of accounts, mode 0700"),
    ("CAP_NET_ADMIN", "asks whether the filter of an account is loaded; makes taps for microVMs on their bridge"),
)
"""Everything else of root is taken away from `cloister-hostd`."""

SKELETON_DIRECTORIES: tuple[tuple[str, int], ...] = (
    ("", 0o755), (".cloister", 0o755), ("dev", 0o755), ("etc", 0o755), ("home", 0o755), ("proc", 0o555),
    ("root", 0o700), ("run", 0o755), ("run/cloister", 0o755), ("run/cloister/box", 0o755), ("sys", 0o555),
    ("tmp", 0o1777), ("usr", 0o755), ("var", 0o755), ("var/tmp", 0o1777),
)  # fmt: skip
_HOSTD_HARDENING = f"""\
{GIVEN_UP}RestrictNamespaces=mnt user uts
RestrictAddressFamilies=AF_UNIX AF_NETLINK
IPAddressDeny=any
SystemCallFilter=@system-service @mount sethostname
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @resources @swap
# No ProtectHostname=: the host's name is taken out of units.
# No RestrictSUIDSGID=: it answers ENOSYS to openat2(2), whose flags a filter cannot see.
TasksMax=1024
MemoryMax=1G
"""
_PROXYD_HARDENING = f"""\
{CONFINED}CapabilityBoundingSet=
InaccessiblePaths=-{AGENTS} -{SERVICES}
ProcSubset=all
# It goes to the internet; the address guard of its own (egress) says where.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
RemoveIPC=yes
LimitNOFILE=65536
"""
_WORD = re.compile(r"[A-Za-z0-9@_./+:=-]+")


class DaemonFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the units of our daemons depend on."""

    python: str
    """The interpreter of this installation; nobody but root can change it."""
    root_links: Mapping[str, str]
    """Links among the system directories of /, such as bin to usr/bin."""
    root_directories: tuple[str, ...] = ()
    """System directories of / that are real ones."""


def word(text: str) -> str:
    """Return one word of a unit file as systemd reads it back (systemd.syntax(7)); `%` and `$` stay themselves."""
    if _WORD.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t") + '"'


def slice_unit() -> str:
    """Return the text of the slice that holds every run and service, for limits over all of them (drop-ins)."""
    return f"{HEAD}[Unit]\nDescription=Agents in sandboxes (Cloister)\nDocumentation=man:cloister(1)\n"


def hostd_socket() -> str:
    """Return the text of the socket that everybody may ask: who asks is the kernel's word."""
    return f"""{HEAD}[Unit]
Description=Start agents as system users (Cloister)
Documentation=man:cloister(1)

[Socket]
ListenStream={HOSTD_SOCKET}
SocketMode=0666
DirectoryMode=0755
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""


def hostd_service(facts: DaemonFacts) -> str:
    """Return the text of root's daemon: no network, eight capabilities, and the host's mounts as they are."""
    names = " ".join(name for name, _ in HOSTD_CAPABILITIES)
    why = "\n".join(f"#   {name}: {reason}" for name, reason in HOSTD_CAPABILITIES)
    return f"""{HEAD}[Unit]
Description=Start agents as system users (Cloister)
Documentation=man:cloister(1)
Requires={HOSTD}.socket
Wants={AUDITD}.socket
After={HOSTD}.socket {AUDITD}.socket

[Service]
ExecStart={word(facts.python)} -I -m cloister.services.hostd
WorkingDirectory=/
UMask=0077
# Not ProtectSystem=strict, ProtectHome=, PrivateTmp=: it clones mounts of its own namespace (open_tree(2)), so what is
# read-only or hidden here could not be anybody's workspace.
ProtectSystem=full
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectProc=invisible
PrivateDevices=yes
# The one device of the host that it has: taps for microVMs (tun(4)).
BindPaths=-/dev/net/tun
DeviceAllow=/dev/net/tun rw
# What it may, and why:
{why}
CapabilityBoundingSet={names}
{_HOSTD_HARDENING}# A request that is under way is a child of it, and finishes or is undone by the next start.
KillMode=mixed
TimeoutStopSec=20
"""


def proxyd_socket() -> str:
    """Return the text of the socket that only root may ask."""
    return f"""{HEAD}[Unit]
Description=Policy, egress and models of the system's agents (Cloister)
Documentation=man:cloister(1)

[Socket]
ListenStream={PROXYD_SOCKET}
SocketMode=0600
DirectoryMode=0755
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""


def proxyd_service(facts: DaemonFacts, credentials: Iterable[tuple[str, str]] = ()) -> str:
    """Return the text of the system's broker: its own user, no capability, and only the keys that the policy names.

    Args:
        facts: of this installation.
        credentials: name and path of each key that it gets (LoadCredential=); without a path, systemd looks in its
            own places (/etc/credstore).
    """
    # An empty line counts where a file is gone: whoever needs it is refused, and not everybody (systemd.exec(5)).
    loaded = "".join(
        f"LoadCredential={word(f'{name}:{path}')}\nSetCredential={name}:\\n\n"
        if path
        else f"LoadCredential={word(name)}\n"
        for name, path in sorted(credentials)
    )
    return f"""{HEAD}[Unit]
Description=Policy, egress and models of the system's agents (Cloister)
Documentation=man:cloister(1)
Requires={PROXYD}.socket
Wants={AUDITD}.socket
After={PROXYD}.socket {AUDITD}.socket network.target nss-lookup.target
# One that dies at each start would be given up with its socket, and with it every later request.
StartLimitIntervalSec=0

[Service]
# Started when it listens and every gateway has its socket: what is ordered after it finds them.
Type=notify
NotifyAccess=main
TimeoutStartSec=300
ExecStart={word(facts.python)} -I -m cloister.services.proxyd
ExecReload=/bin/kill -HUP $MAINPID
User={PROXY_USER}
Group={PROXY_USER}
WorkingDirectory=/
UMask=0077
StateDirectory={_below(PROXY_STATE, "/var/lib")}
StateDirectoryMode=0700
RuntimeDirectory={_below(PROXY_RUNTIME, "/run")}
RuntimeDirectoryMode=0700
# Services that live on while it is restarted keep the mounts of their sockets' directories.
RuntimeDirectoryPreserve=yes
{loaded}{_PROXYD_HARDENING}KillMode=mixed
TimeoutStopSec=30
Restart=on-failure
RestartSec=1

[Install]
WantedBy=multi-user.target
"""


def sysusers(accounts: Iterable[Account]) -> str:
    """Return sysusers.d(5): no home, no shell, no password; each group has the number of its user."""
    lines = [f'u {name} - "{whose}" / /usr/sbin/nologin' for name, whose in DAEMON_USERS.items()]
    for account in accounts:
        whose = f"service {account.service}" if account.service else f"{account.agent} of {account.user}"
        lines.append(f'u {account.name} {account.uid} "Cloister {whose}" /nonexistent /usr/sbin/nologin')
    return HEAD + "\n".join(lines) + "\n"


def runtime_directories() -> tuple[Directory, ...]:
    """Return the directories below /run that are there while the system is up."""
    return (
        Directory(path=RUNTIME),
        *(Directory(path=f"{SKELETON}/{name}".rstrip("/"), mode=mode) for name, mode in SKELETON_DIRECTORIES),
    )


def skeleton(facts: DaemonFacts) -> tuple[tuple[Directory, ...], tuple[Link, ...]]:
    """Return what the skeleton has like this host: `bin` as a link to `usr/bin`, or as a place to mount it."""
    names = [name for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32") if name in facts.root_links]
    links = tuple(Link(path=f"{SKELETON}/{name}", target=facts.root_links[name].lstrip("/")) for name in names)
    places = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt", "nix", "gnu")
    real = tuple(Directory(path=f"{SKELETON}/{name}") for name in places if name in facts.root_directories)
    return real, links


def tmpfiles(directories: Iterable[Directory], links: Iterable[Link]) -> str:
    """Return tmpfiles.d(5): what is below /run, made again at each boot."""
    lines = [f"d {one.path} {one.mode:04o} root root -" for one in directories if one.path.startswith(f"{RUNTIME}")]
    lines += [f"L {link.path} - - - - {link.target}" for link in links]
    return HEAD + "\n".join(lines) + "\n"


def fixed_directories() -> tuple[Directory, ...]:
    """Return what is root's in /etc and /var/lib: an agent can change what is in its own leaves only."""
    return (
        *(Directory(path=os.path.dirname(path), as_found=True) for path in (SYSUSERS, TMPFILES)),
        Directory(path=ETC),
        Directory(path=KEYS, mode=0o700),
        Directory(path=STATE),
        Directory(path=AGENTS, mode=0o711),
        Directory(path=SERVICES),
    )


def daemon_units(facts: DaemonFacts, credentials: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Return the units of our daemons: path and text."""
    texts = {
        SLICE: slice_unit(),
        f"{HOSTD}.socket": hostd_socket(),
        f"{HOSTD}.service": hostd_service(facts),
        f"{PROXYD}.socket": proxyd_socket(),
        f"{PROXYD}.service": proxyd_service(facts, credentials),
    }
    return {f"{UNITS}/{name}": text for name, text in texts.items()}


def _below(path: str, base: str) -> str:
    return path.removeprefix(f"{base}/")
