"""One event: a thing that an agent did, or that was done to its sandbox. Sources fill it, renderings read it.

Names are those of OCSF (schema.ocsf.io, Open Cybersecurity Schema Framework) wherever it has one; `kind` is ours,
one word per thing that happens, and `kinds.toml` tells class and activity for it. The log is JSON lines of exactly
these fields, so the part that C writes (kernel events) and the part that Python writes have one form. What is not
here: sequence number and hash, which the keeper of the log puts around an event (`chain`), and how others spell it
(`ocsf`, `cef`, `syslog`, `otlp`).

Text that an agent chose (paths, arguments, names) is kept as it was, but for bytes that are no UTF-8, which stand as
the escapes of Python's `backslashreplace`. Renderings escape; nothing is trusted to be harmless.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal[1, 2, 3, 4, 5]
"""OCSF severity_id: 1 informational, 2 low, 3 medium, 4 high, 5 critical."""
Disposition = Literal["", "allowed", "blocked", "asked"]
"""What was decided about it: OCSF disposition_id 1, 2; `asked` is a question that is still open."""


class Process(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process (OCSF object `process`). Ids are the host's, but for `namespace_pid`."""

    pid: int
    uid: str = ""
    """The identity that outlives the pid: hash of boot id, start time and pid, 32 hexadecimal digits (`identity`)."""
    namespace_pid: int = 0
    name: str = ""
    """comm(5), at most 15 bytes."""
    path: str = ""
    """What it executes, as the kernel names it."""
    cmd_line: tuple[str, ...] = ()
    """Its arguments; cut where the kernel's side cuts them, which `truncated` tells."""
    cwd: str = ""
    user_id: int | None = None
    parent_uid: str = ""
    """`uid` of the process that made it."""
    parent_pid: int = 0
    hash: str = ""
    """SHA-256 of the executable, where a source knows it; the sensor does not."""
    truncated: bool = False


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file (OCSF object `file`)."""

    path: str
    """As the kernel resolved it where the tier can see that, else as it was asked for."""
    resolved: bool = False
    """`path` is the kernel's own: absolute, links followed."""
    target: str = ""
    """The other name of a rename or link."""
    flags: int = 0
    """open(2) flags or mode, as numbers of the kernel."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The other side of a connection (OCSF object `network_endpoint`)."""

    hostname: str = ""
    ip: str = ""
    port: int = 0
    path: str = ""
    """Of a Unix socket; `@` first for an abstract one."""
    protocol: str = ""
    """`tcp`, `udp`, `unix`, `http`, `tls`, `socks5`."""


class Http(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request that could be read."""

    method: str = ""
    path: str = ""
    """Without its query, which may hold secrets."""
    status: int = 0


class Model(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call of a model."""

    provider: str
    name: str
    tokens: int = 0
    cost_usd: float = 0.0
    request_id: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened."""

    time: int
    """When, in nanoseconds since the epoch. Kernel events: CLOCK_BOOTTIME plus the anchor of their stream."""
    kind: str
    """`run.started`, `egress.decided`, `process.executed`, …: a key of `kinds.toml`."""
    run: str = ""
    agent: str = ""
    user: str = ""
    """Name of the person whose run it is."""
    account: str = ""
    """The system user as whom it runs, where that is not the person."""
    policy: str = ""
    """Digest of the policy; on events of a run's life, not on each."""
    plan: str = ""
    """Digest of the plan; likewise."""
    severity_id: Severity = 1
    disposition: Disposition = ""
    rule: str = ""
    """Which rule of the policy (or which detection) decided."""
    reason: str = ""
    """The kebab-case reason."""
    error: int = 0
    """errno of what failed; 0 when it worked or when nobody knows."""
    message: str = ""
    """One line for people, never a secret."""
    process: Process | None = None
    target: Process | None = None
    """The process that something was done to (ptrace, kill)."""
    file: File | None = None
    endpoint: Endpoint | None = None
    http: Http | None = None
    model: Model | None = None
    credential: str = ""
    """Name of the credential that was used, never its secret."""
    bytes_up: int = 0
    bytes_down: int = 0
    duration_ns: int = 0
    tier: str = ""
    """Kernel events: what saw it (`lsm`, `fentry`, `tracepoint`, `cgroup`, `seccomp`)."""
    source: str = ""
    """Which process reported it: `broker`, `proxyd`, `hostd`, `watchdog`, `sensor`, `auditd`."""
    reporter_uid: int | None = None
    """The uid at the other end of the keeper's socket (SO_PEERCRED), set by the keeper alone."""
    id: str = ""
    """Given by the door: random per process, with a counter. The same id of the same reporter is the same event, told
    twice. Kernel events have none: their place in the ring is one."""
    count: int = 1
    """How many of the same this stands for, where a source folds repetitions."""
    details: dict[str, str | int | float | bool] = {}
    """What has no field of its own, flat."""
