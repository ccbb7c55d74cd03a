"""The unit files of one gateway, as texts: its own service, and the port of the host that leads to it.

The gateway's unit has the properties of a run's unit (`isolation.unit`) and what a service needs besides: it is
restarted, stopped patiently, reads its secrets from systemd's credentials. It has no network of the host's. So its
port is served by a socket of systemd's and `systemd-socket-proxyd`, another user without any network of its
own, which connects to a Unix socket that the shim publishes.

A run is mounted by `cloister-hostd`; a service is mounted by systemd, in a root directory of its own below /run that
`tmpfiles_text` describes. What the gateway can write never decides what is mounted where: mount points are looked at
without following links, before each start, when nothing of it lives, and cannot be moved while it does.

Sources: systemd.unit(5), systemd.exec(5), systemd.service(5), systemd-socket-proxyd(8), tmpfiles.d(5);
docs.openclaw.ai for KillMode, TimeoutStopSec, SuccessExitStatus, RestartPreventExitStatus and OOMPolicy.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from cloister.isolation.inner import BOX, EGRESS_SOCKET, MODEL_PORT, PROBE_ADDRESS, PROXY_PORT
from cloister.plan.unit import RUNTIME, SERVICE_PREFIX, STATE

SERVICES = f"{STATE}/services"
SHIM = "/.cloister/cloister-shim"
FILTER = "/.cloister/seccomp.bpf"
"""Our own filter of system calls, which the shim installs: systemd's cannot look at arguments."""
PROGRAMS = "/.cloister/bin"
"""Where names stand for an agent's programs: not below /run, which systemd covers (MountAPIVFS=)."""
PUBLISH = "/run/cloister/publish"
"""Where the shim makes the gateway's port a Unix socket, in the sandbox."""
SOCKET = "gateway.sock"
END = "end.sock"
"""Where the shim is asked to end, beside it."""
DESCRIPTION = "Description=Cloister gateway "
STOP = "TimeoutStopSec=330"
"""What OpenClaw may need to finish what it is at."""
SOCKET_PROXY = "/usr/lib/systemd/systemd-socket-proxyd"
PROXYD = "cloister-proxyd.service"
MOUNT_POINTS = "mount-points.conf"
"""In `Owned.tree`: what `tmpfiles_text` returns."""
CARRIED_ETC = (
    "alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "crypto-policies", "fonts", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "localtime", "locale.alias", "mime.types", "os-release", "pki", "protocols",
    "services", "ssl", "terminfo", "timezone",
)  # fmt: skip
"""Of the host's /etc, where it exists. Keys in /etc/ssl/private are root's, and hidden besides."""
_REPLACED = frozenset({
    "CollectMode", "KillMode", "TimeoutStopSec", "RootDirectory", "WorkingDirectory", "OOMPolicy", "BindReadOnlyPaths",
    "StandardInput", "StandardOutput", "StandardError",
})  # fmt: skip
"""Properties of runs that a service has with values of its own."""
_LIFTED = frozenset({"RestrictSUIDSGID"})
"""It answers openat2(2) with ENOSYS, since a filter cannot see its flags, and OpenClaw takes its locks by that call.
What a gateway marks setuid is nobody's to run: root's directory above its home and workspace lets only its group in."""


class ServiceUnit(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the units of one gateway, as choices already made."""

    joined: str
    """`SERVICE`, or `SERVICE-INSTANCE`."""
    label: str
    account: str
    port: int
    restart: str
    properties: tuple[tuple[str, str], ...]
    """As `isolation.unit.properties` returns them."""
    command: tuple[str, ...]
    """What the shim starts."""
    environment: Mapping[str, str]
    environment_files: tuple[str, ...] = ()
    credentials: Mapping[str, str] = {}
    """By name: where systemd finds the secret, a path, or a name in its store."""
    checked: tuple[str, ...] = ()
    """Credentials that must not be empty."""
    handed: tuple[str, ...] = ()
    """Credentials that are files of the system's broker: placeholders."""
    shim: str
    """On the host."""
    systemd_tmpfiles: str = "/usr/bin/systemd-tmpfiles"
    links: Mapping[str, str] = {}
    """Links among the system directories of /, such as bin to usr/bin."""
    programs: Mapping[str, str] = {}
    """Names on the PATH inside, and what they stand for."""
    shown: tuple[str, ...] = ()
    """Paths of the host shown read-only, at the same place."""
    etc: tuple[str, ...] = ()
    """Names of files written for it (`Owned.etc`)."""
    documents: tuple[str, ...] = ()
    """Names of read-only documents in its workspace."""
    seeded: tuple[str, ...] = ()
    """Names of documents that it may change."""
    state: tuple[str, ...] = ()
    """Directories below its home that plugins need, by paths relative to it."""
    settings: Mapping[str, str] = {}
    """Files of root's shown read-only below its home: relative path and source in `Owned.tree`."""
    hidden: tuple[str, ...] = ()
    """Programs taken away, by full path."""
    out_of_memory: str = "continue"
    validate: tuple[str, ...] = ()
    """A command that judges the configuration, with the gateway's user and in its sandbox, before it starts."""
    seccomp: bytes = b""
    landlock: str = "available"
    nested: bool = False

    @property
    def waited_for(self) -> bool:
        """Say whether systemd could kill it in the moment of its TERM, so that `end_text` is needed."""
        return ("PrivatePIDs", "yes") in self.properties

    @property
    def places(self) -> Owned:
        """Return where its things are."""
        return Owned(self.account)


class Owned(str):
    """The places of one account's gateway, all named by it."""

    __slots__ = ()

    @property
    def tree(self) -> str:
        """Root's: configuration, documents and skills as they were declared."""
        return f"{SERVICES}/{self}.d"

    @property
    def home(self) -> str:
        """The account's."""
        return f"{SERVICES}/{self}/home"

    @property
    def workspace(self) -> str:
        """The account's, with what was declared mounted into it."""
        return f"{SERVICES}/{self}/workspace"

    @property
    def root(self) -> str:
        """The empty tree that systemd mounts the sandbox onto."""
        return f"{RUNTIME}/services/{self}/root"

    @property
    def published(self) -> str:
        """Where the gateway's Unix socket is, for its port."""
        return f"{RUNTIME}/services/{self}/port"

    @property
    def secrets(self) -> str:
        """Where the gateway reads its secrets: files of its own on a tmpfs, which it cannot write (Landlock)."""
        return f"{RUNTIME}/services/{self}/secrets"


def unit_name(joined: str) -> str:
    """Return the name of a gateway's unit."""
    return f"{SERVICE_PREFIX}{joined}.service"


def port_units(joined: str) -> tuple[str, str]:
    """Return the names of the units that serve its port: socket and service."""
    return f"cloister-port-{joined}.socket", f"cloister-port-{joined}.service"


def places_unit(joined: str) -> str:
    """Return the name of the unit that makes its mount points, before each start."""
    return f"cloister-places-{joined}.service"


def end_unit(joined: str) -> str:
    """Return the name of the unit that asks it to end, and waits for that."""
    return f"cloister-end-{joined}.service"


def broker_directory(joined: str) -> str:
    """Return what the system's broker keeps for a gateway: `box/`, `model-key` and `environment`."""
    return f"{RUNTIME}/proxy/services/{joined}"


def service_text(unit: ServiceUnit) -> str:
    """Return the text of the gateway's unit file."""
    socket = port_units(unit.joined)[0]
    lines = [
        "[Unit]",
        f"{DESCRIPTION}{unit.label}",
        f"Wants=network-online.target {PROXYD} {socket}{f' {end_unit(unit.joined)}' if unit.waited_for else ''}",
        f"Requires={places_unit(unit.joined)}",
        f"After=network-online.target {PROXYD} {places_unit(unit.joined)}",
        f"PartOf={PROXYD}",  # restarted with it: it holds placeholders that the broker made
        "StartLimitIntervalSec=300",
        "StartLimitBurst=10",
        "",
        "[Service]",
        *(f"{name}={value}" for name, value in unit.properties if name not in _REPLACED | _LIFTED),
        *_life(unit),
        *_mounts(unit),
        *(f"LoadCredential={name}:{_percent(source)}" for name, source in unit.credentials.items()),
        *(f"EnvironmentFile={_percent(path)}" for path in unit.environment_files),
        f"EnvironmentFile=-{broker_directory(unit.joined)}/environment",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(unit.environment.items())),
        *_commands(unit),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _life(unit: ServiceUnit) -> Iterator[str]:
    yield f"Restart={unit.restart}"
    yield "RestartSec=5"
    yield STOP
    yield "KillMode=mixed"
    yield "SuccessExitStatus=0 143"
    yield "RestartPreventExitStatus=78"
    yield f"OOMPolicy={unit.out_of_memory}"
    yield "StandardInput=null"
    yield "StandardOutput=journal"
    yield "StandardError=journal"


def _mounts(unit: ServiceUnit) -> Iterator[str]:
    at = unit.places
    yield f"RootDirectory={at.root}"
    yield f"WorkingDirectory={at.workspace}"
    yield f"RuntimeDirectory={at.secrets.removeprefix('/run/')}"
    yield "RuntimeDirectoryMode=0700"
    yield f"BindPaths={at.home} {at.workspace} {at.published}:{PUBLISH}"
    shared = [value for name, value in unit.properties if name == "BindReadOnlyPaths" and ":" not in value]
    shown = [*shared, *(f"-/etc/{name}" for name in CARRIED_ETC), *(_percent(path) for path in unit.shown)]
    shown += [f"{at.tree}/etc/{name}:/etc/{name}" for name in unit.etc]
    shown += [f"{_percent(unit.shim)}:{SHIM}", f"{broker_directory(unit.joined)}/box:{BOX}", at.tree]
    shown += [f"{at.tree}/skills:{at.workspace}/skills"]
    shown += [f"{at.tree}/documents/{name}:{at.workspace}/{name}" for name in unit.documents]
    shown += [f"{at.tree}/{source}:{at.home}/{target}" for target, source in unit.settings.items()]
    yield from (f"BindReadOnlyPaths={path}" for path in shown)
    yield "InaccessiblePaths=-+/etc/ssl/private"
    yield from (f"InaccessiblePaths=-+{path}" for path in unit.hidden)


def _commands(unit: ServiceUnit) -> Iterator[str]:
    for name in unit.checked:
        yield f"ExecStartPre=/usr/bin/test -s %d/{name}"
    if unit.credentials:
        # systemd's own copies are root's, with an ACL; OpenClaw reads secrets only from files of its own user's.
        copied = " ".join(f"%d/{name}" for name in unit.credentials)
        yield f"ExecStartPre=/usr/bin/install -m 0400 -t {unit.places.secrets} {copied}"
    if unit.validate:
        yield "ExecStartPre=" + " ".join(_word(word) for word in unit.validate)
    at = unit.places
    shim = [SHIM, "service", "--egress", EGRESS_SOCKET]
    for port in (PROXY_PORT, MODEL_PORT):
        shim += ["--listen", f"127.0.0.1:{port}"]
    shim += ["--publish", f"{PUBLISH}/{SOCKET}=127.0.0.1:{unit.port}", "--end", f"{PUBLISH}/{END}"]
    shim += ["--probe-write", "/usr", "--probe-connect", PROBE_ADDRESS, "--landlock", unit.landlock]
    if unit.landlock != "off":
        writable = (at.home, at.workspace, "/tmp", "/var/tmp", "/dev", "/proc")  # noqa: S108  # the unit's own
        shim += ["--landlock-ro", "/", *(word for path in writable for word in ("--landlock-rw", path))]
    if unit.nested:
        shim.append("--nested")
    if unit.seccomp:
        shim += ["--seccomp", FILTER]
    shim.append("--")
    yield "ExecStart=" + " ".join(_word(word) for word in (*shim, *unit.command))


def places_text(unit: ServiceUnit) -> str:
    """Return the unit that makes the mount points: not a command of the gateway's own unit, whose mounts need them."""
    kept = broker_directory(unit.joined)
    awaited = (f"{kept}/box/egress.sock", *(f"{kept}/{name}" for name in unit.handed))
    lines = [
        "[Unit]",
        f"Description=Mount points of the Cloister gateway {unit.label}",
        f"After={PROXYD}",
        "StartLimitIntervalSec=0",  # the gateway's own limit counts
        "",
        "[Service]",
        "Type=oneshot",
        # The broker has them before it says that it is there; for a gateway that `apply` adds it is told to look again.
        f"ExecStart=/bin/sh -c {_WAIT} sh {' '.join(awaited)}",
        f"ExecStart={unit.systemd_tmpfiles} --create {unit.places.tree}/{MOUNT_POINTS}",
        f"ReadWritePaths={RUNTIME} {STATE}",
        # Root's files and those of the account, in directories that belong to one or the other.
        "CapabilityBoundingSet=CAP_CHOWN CAP_FOWNER CAP_FSETID CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH",
        *(line for line in RELAY_HARDENING if not line.startswith(_NOT_FOR_PLACES)),
    ]
    return "\n".join(lines) + "\n"


def end_text(unit: ServiceUnit) -> str:
    """Return the unit that is stopped before the gateway is: it asks it to end, and waits for that.

    systemd 257 with PrivatePIDs= often takes the main process for a stranger's child, and kills it in the moment of its
    TERM (host/shim/ending.h). Not ExecStop= of the gateway's own unit: for that systemd would set up the sandbox once
    more, by the newest unit file, while the gateway lives and can have put links where places are mounted.
    """
    gateway = unit_name(unit.joined)
    lines = [
        "[Unit]",
        f"Description=End of the Cloister gateway {unit.label}: asked for, and waited for",
        f"PartOf={gateway}",
        f"After={gateway}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "ExecStart=/usr/bin/true",
        f"ExecStop={_word(unit.shim)} end {unit.places.published}/{END}",
        STOP,
        "DynamicUser=yes",
        f"SupplementaryGroups={unit.account}",
        *RELAY_HARDENING,
    ]
    return "\n".join(lines) + "\n"


def port_texts(unit: ServiceUnit) -> dict[str, str]:
    """Return the units that serve its port on the host's loopback, by name.

    The relay has another user than the gateway, so that the gateway cannot get at a process that holds a socket of
    the host's network; and no network of its own, so that it can only hand on what it accepted.
    """
    socket, service = port_units(unit.joined)
    gateway = unit_name(unit.joined)
    return {
        socket: "\n".join(
            (
                "[Unit]",
                f"Description=Port of the Cloister gateway {unit.label}",
                "# Not part of the gateway: while that restarts, nobody else can take the port.",
                "",
                "[Socket]",
                f"ListenStream=127.0.0.1:{unit.port}",
                "",
                "[Install]",
                "WantedBy=sockets.target",
                "",
            )
        ),
        service: "\n".join(
            (
                "[Unit]",
                f"Description=Port of the Cloister gateway {unit.label}: carries bytes",
                f"Requires={socket}",
                f"PartOf={gateway}",
                f"After={socket} {gateway}",
                "StartLimitIntervalSec=0",  # else the fifth restart of the gateway within seconds would fail the socket
                "",
                "[Service]",
                f"ExecStart={SOCKET_PROXY} --exit-idle-time=60 {unit.places.published}/{SOCKET}",
                "DynamicUser=yes",
                f"SupplementaryGroups={unit.account}",
                *RELAY_HARDENING,
                "",
            )
        ),
    }


_NOT_FOR_PLACES = ("CapabilityBoundingSet", "PrivateUsers", "SystemCallFilter=~", "UMask")
"""What would keep systemd-tmpfiles from giving an account what is its own (chown(2) is in @privileged)."""
_WAIT = "'i=0; for f; do until [ -e $$f ]; do i=$$((i+1)); [ $$i -lt 100 ] || exit 1; sleep 0.1; done; done'"
RELAY_HARDENING = (
    "Slice=cloister.slice",
    "PrivateNetwork=yes",
    "PrivateUsers=yes",
    "PrivateDevices=yes",
    "DevicePolicy=closed",
    "PrivateIPC=yes",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "CapabilityBoundingSet=",
    "NoNewPrivileges=yes",
    "RestrictAddressFamilies=AF_UNIX",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources",
    "UMask=0077",
    "LimitCORE=0",
    "MemoryMax=64M",
    "TasksMax=16",
)


def tmpfiles_text(unit: ServiceUnit) -> str:
    """Return what must be there before the sandbox is mounted, for systemd-tmpfiles(8), which follows no links.

    Documents and skills are mounted over files and a directory of the gateway's own. It runs only while they are
    mounted, and the kernel neither removes nor renames a mount point; when this runs, nothing of it lives. A link
    that it left where something new is declared is an error, not a way elsewhere.
    """
    at, name = unit.places, unit.account
    lines = [
        f"d {SERVICES} 0755 root root",
        f"d {SERVICES}/{name} 0750 root {name}",
        f"d {at.home} 0700 {name} {name}",
        f"d {at.workspace} 0700 {name} {name}",
        f"d {at.workspace}/skills 0750 {name} {name}",
        *(f"f {at.workspace}/{document} 0640 {name} {name}" for document in unit.documents),
        *(
            f"C {at.workspace}/{document} 0640 {name} {name} - {at.tree}/documents/{document}"
            for document in unit.seeded
        ),
        *(f"d {at.home}/{path} 0750 {name} {name}" for path in _levels(unit.state)),
        *(f"f {at.home}/{path} 0640 {name} {name}" for path in unit.settings),
        f"d {RUNTIME}/services 0755 root root",
        f"d {RUNTIME}/services/{name} 0755 root root",
        f"d {at.published} 0750 {name} {name}",
        f"d {at.root} 0755 root root",
        *(f"d {at.root}{path} 0755 root root" for path in _levels([PROGRAMS])),
        *([f"f+~ {at.root}{FILTER} 0644 root root - {b64encode(unit.seccomp).decode()}"] if unit.seccomp else []),
        *(f"L {at.root}/{link} - - - - {target}" for link, target in sorted(unit.links.items())),
        *(f"L+ {at.root}{PROGRAMS}/{program} - - - - {target}" for program, target in sorted(unit.programs.items())),
    ]
    return "\n".join(lines) + "\n"


def _levels(paths: Iterable[str]) -> Iterator[str]:
    """Yield each path after the directories above it."""
    seen: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            if level := "/".join(parts[:end]):
                seen.setdefault(level)
    yield from seen


def _percent(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """Return one item of a list of a unit file (systemd.syntax(7)): in quotes, `%` doubled."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{_percent(escaped)}"'


def _word(text: str) -> str:
    """Return one word of a command line (systemd.service(5), COMMAND LINES): `$` doubled besides."""
    return _quoted(text.replace("$", "$$"))
