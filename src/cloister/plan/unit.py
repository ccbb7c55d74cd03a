"""How a run with `isolation = "unit"` is started, as data: what the system's broker asks of `cloister-hostd`.

Everything root does for a run stands here, so that one floor (`host/unit_floor.py`) can refuse it as a whole.
Paths of people and agents never stand here: what lies in the workspace is named relative to a descriptor that
came with the request, what lies elsewhere by a base of ours. It holds no secret.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

ETC = "/etc/cloister"
STATE = "/var/lib/cloister"
RUNTIME = "/run/cloister"
HOSTD_SOCKET = f"{RUNTIME}/hostd.sock"
PROXYD_SOCKET = f"{RUNTIME}/proxyd.sock"
PROXY_USER = "cloister-proxy"
PROXY_STATE = f"{STATE}/proxy"
AUDIT_USER = "cloister-audit"
"""User and group of the system's keeper; members of the group may read the log."""
AUDIT_SOCKET = f"{RUNTIME}/audit.sock"
AUDIT_LOG = "/var/log/cloister/audit"
EXPORT_USER = "cloister-export"
"""Sends the log elsewhere; may read it, and nothing else of ours."""
DAEMON_USERS = {
    PROXY_USER: "Cloister egress and models",
    AUDIT_USER: "Cloister audit log",
    EXPORT_USER: "Cloister audit export",
}
"""Users of our own processes, and what the password database says of them."""
AUDIT_KEYS = f"{STATE}/audit"
"""Where the key that signs the log is: not beside it, since logs are copied."""
EXPORT_STATE = f"{STATE}/export"
"""How far each receiver of the log has got."""
PROXY_RUNTIME = f"{RUNTIME}/proxy"
"""Made by systemd for the system's broker (RuntimeDirectory=), mode 0700: no other uid gets to a run's socket."""
AGENTS = f"{STATE}/agents"
"""ACCOUNT/PROJECT below it is an agent's own state for a project, the account's; the levels above are root's."""
SKELETON = f"{RUNTIME}/root"
"""The empty tree that units have as their root directory: what they see is mounted onto it, nothing else is there."""
SYSTEM_FILE = f"{STATE}/system.json"
UNIT_PREFIX = "cloister-run-"
NETWORK_PREFIX = "cloister-net-"
"""Of the unit beside a run in mode `internet`."""
SERVICE_PREFIX = "cloister-service-"
ACCOUNT_PREFIX = "cl-"
SLICE = "cloister.slice"
FIRST_UID = 1_900_000_000
UID_COUNT = 65_536
"""1879048192 to 2147352575 are used by nobody (systemd, UIDS-GIDS): above its containers, below its foreign range."""

Base = Literal["workspace", "copy", "repository", "state", "box", "carry", "host", "none"]


class Account(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One uid of ours: an agent for one user, or an instance of a service (user empty). Its group has that number."""

    name: str
    uid: int
    agent: str
    user: str = ""
    service: str = ""
    """`NAME`, or `NAME-INSTANCE`, of the service it is for."""


class Grant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That a user may start an agent below these directories (`~` is the user's home), as which account."""

    user: str
    agent: str
    account: str
    roots: tuple[str, ...]
    nested: bool = False
    """The policy lets the agent build sandboxes of its own, so what these need may be missing from its unit."""
    network: bool = False
    """The policy gives the agent the internet, behind the packet filter of its account."""


class VmBridge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bridge of microVMs: where the policy wants it, and whose guests may be on it."""

    network: str
    users: tuple[str, ...] = ()


class System(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `cloister apply` has written down for `cloister-hostd`: `SYSTEM_FILE`, root's, readable by all."""

    version: Literal[1] = 1
    policy_digest: str = ""
    accounts: tuple[Account, ...] = ()
    """Also those that are not granted any more: a uid is never given to somebody else while files may have it."""
    grants: tuple[Grant, ...] = ()
    audit: Literal["stop", "alarm"] = "stop"
    """What follows when nothing can be recorded (`[audit] on_failure`)."""
    bridge: VmBridge | None = None
    """None: there is none."""


class UnitMount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mount of a unit, made by descriptor in its mount namespace before its go.

    `workspace`: below the descriptor of the workspace's root, ids mapped. `copy`: below the user's directory for the
    changes of this run, ids mapped. `repository`: below the git directory of a workspace that has it elsewhere, ids
    mapped. `state`: below AGENTS/ACCOUNT/PROJECT. `box`: the run's directory of the system's broker. `carry`: what
    came with the request, unpacked. `host`: an absolute path that root owns on every level. `none`: nothing (tmpfs,
    masks). The kind `overlay` shows the workspace, and what is written goes into `upper` of the copy.

    A mount point that is missing is made where we made the file system below it: on a tmpfs of ours (below a
    private one what is made belongs to the account), in the skeleton's top, or by the account itself in its state
    (`UnitLaunch.points`). In the workspace it must be there: the user's own broker makes placeholders.
    """

    kind: Literal["rw", "ro", "overlay", "tmpfs", "mask-file", "mask-directory"]
    target: str
    base: Base = "none"
    source: str = ""
    """Relative to the base, without `..`; absolute for `host`; empty for the base itself."""
    optional: bool = False
    """Left out where the source does not exist."""
    size_bytes: int | None = None
    """Of a tmpfs."""
    private: bool = False
    """A tmpfs that belongs to the account, mode 0700; else root's, 0755."""

    def describe(self) -> str:
        """Return one line for people."""
        size = f", {self.size_bytes} bytes" if self.size_bytes is not None else ""
        source = f" from {self.base}:{self.source or '.'}" if self.base != "none" else ""
        return f"{self.kind} {self.target}{source}{size}"


class UnitNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The unit beside a run in mode `internet`: as the agent's account, in the host's network, it runs `Launch.pasta`.

    Its first process makes the network namespace that the agent's unit is put into, with `Launch.ruleset` in it.
    It starts only where the packet filter of the account is loaded.
    """

    unit: str
    """Name, with `.service`."""
    argv: tuple[str, ...]
    properties: tuple[tuple[str, str], ...]


class UnitLaunch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The unit of one run."""

    unit: str
    """Name, with `.service`."""
    account: str
    uid: int
    properties: tuple[tuple[str, str], ...]
    """As for `systemd-run -p`, in order: some names stand several times, and add up."""
    mounts: tuple[UnitMount, ...]
    """In the order in which they are made."""
    state: tuple[str, ...] = ()
    """Directories to make below AGENTS/ACCOUNT/PROJECT, for the account."""
    seeds: tuple[tuple[str, str], ...] = ()
    """Files below the state, relative, and their content: written by the account, where there is nothing yet."""
    points: tuple[tuple[str, Literal["file", "directory"]], ...] = ()
    """Mount points to make below the state, by the account, where there is nothing yet."""
    project: str = ""
    """PROJECT, 16 hexadecimal digits."""
    ownership: Literal["idmap", "group", "none"] = "idmap"
    """How what the agent makes in the workspace becomes the user's."""
    workspace: str = ""
    """Where the workspace is mounted: its own absolute path."""
    network: UnitNetwork | None = None
    """In mode `internet`: what connects the unit."""
    limited: bool = False
    """The policy wants its limits kept by the kernel: the unit does not start where one of them is not in force."""


COPY_UPPER, COPY_WORK = "upper", "work"
"""The directories below a copy: what changed, and the file system's own."""


def delivered_name(path: str) -> str:
    """Return the name by which systemd hands a secret file to the system's broker (LoadCredential=).

    The policy goes on naming the file: who reads `file:PATH` looks among its credentials first (`host/secrets.py`).
    """
    return f"file-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
