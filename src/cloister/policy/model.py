"""The policy as values: every table and key of `cloister.toml`, for all three backends.

One Struct per table, all frozen, all refusing keys they do not know. This is the only place
where a key, its type and its default are written down; the JSON Schema and
`cloister.toml(5)` are generated from it, and the docstring of an attribute is its manual
text. Reading files, merging presets and reporting mistakes is for `load`; what values may
be combined is for `check`. A key stands here even when no backend enforces it yet: the
compiler refuses it then (`runs/compile.py`), it never ignores it.

`tighten` needs a rule for every key of an agent; a test fails until a new key has one.

Names follow systemd in snake_case where systemd has the thing (`memory_max` is
`MemoryMax=`). Sizes are "512M", "4G" (powers of 1024); durations "90s", "10m", "8h", "2d".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from cloister.policy.injection import Injection
from cloister.policy.login import Login
from cloister.policy.model_audit import Action, Conditions, DetectionRule
from cloister.policy.model_llm import Ledger, Llm, Protocol, Provider
from cloister.policy.services import Service
from cloister.policy.table import Count, Port, Table

__all__ = [
    "SCHEMA",
    "Action",
    "Agent",
    "AgentSandbox",
    "Audit",
    "Conditions",
    "Count",
    "Credential",
    "DetectionRule",
    "Egress",
    "EgressMode",
    "EgressRule",
    "Filesystem",
    "Hardening",
    "Identity",
    "Images",
    "Injection",
    "Isolation",
    "Ledger",
    "Limits",
    "Llm",
    "Login",
    "MicroVm",
    "MicroVms",
    "Policy",
    "Port",
    "Preset",
    "Project",
    "Protocol",
    "Provider",
    "Service",
    "Table",
    "Unit",
    "User",
    "Workspace",
]

SCHEMA = 1

Isolation = Literal["namespace", "unit", "microvm"]
EgressMode = Literal["deny", "ask", "learn", "internet"]


class Workspace(Table, frozen=True):
    """`[agents.NAME.workspace]`: the directory the agent works in."""

    roots: tuple[str, ...] = ()
    """Directories below which the agent may be started; `~` is the caller's home; the longest root wins.
    Empty means the project directory (the top of the git work tree, else the current directory)."""
    mode: Literal["direct", "overlay"] = "direct"
    """`direct` writes to the directory itself; `overlay` keeps changes aside until `cloister apply`."""
    protect: tuple[str, ...] = ()
    """More paths below the workspace that stay read-only, present or not."""
    unprotected: tuple[str, ...] = ()
    """Names from the built-in protection list to leave writable, such as `.vscode`. The audit records it."""


class Filesystem(Table, frozen=True):
    """`[agents.NAME.filesystem]`: what else of the host the agent may see. Everything not named is not there."""

    read: tuple[str, ...] = ()
    """Host paths visible read-only."""
    write: tuple[str, ...] = ()
    """Host paths visible and writable."""
    hide: tuple[str, ...] = ()
    """Paths below the workspace or below `read` and `write` that are masked: empty and unreadable."""


class EgressRule(Table, frozen=True):
    """One entry of `egress.allow` or `egress.deny` in its long form."""

    host: str
    """A name, `*.name` (any label below it, not the name itself), or an address or CIDR."""
    port: Port | None = None
    """The TCP port, 1 to 65535. Left out it means 443 in `allow` and every port in `deny`."""
    methods: tuple[str, ...] = ()
    """HTTP methods, in capitals; empty means all. Needs plain HTTP or a credential bound to the host."""
    paths: tuple[str, ...] = ()
    """Path patterns: `*` stands for one segment, a closing `/**` for everything below; empty means all."""


class Egress(Table, frozen=True):
    """`[agents.NAME.egress]`: what the agent may reach. The default is nothing."""

    mode: EgressMode = "deny"
    """`deny` outside the allowlist, `ask` the user, `learn` (public hosts, recorded), or `internet` (addresses too)."""
    allow: tuple[str | EgressRule, ...] = ()
    """Rules `host`, `host:port` or the long form; the port is 443 when left out. Presets add their own hosts."""
    preset_hosts: bool = True
    """Whether the hosts of the preset are allowed as well."""
    deny: tuple[str | EgressRule, ...] = ()
    """Rules that win over `allow`, `ask` and `learn`; without a port they cover every port."""
    private: tuple[str, ...] = ()
    """Exceptions inside the refused ranges (one NAS, one test server), as CIDR; a name must be allowed as well."""
    upstream_proxy: str = ""
    """`http://host:port` to go through, `env` for the broker's own `https_proxy`, empty for none."""


class Credential(Table, frozen=True):
    """`[agents.NAME.credentials.NAME]`: a secret the agent may use without seeing it."""

    secret: str = ""
    """Where the secret is kept, never the secret itself. It is read with each use, so a rotated one counts at once.
    `file:PATH` is a file of yours or root's, mode 0600, no link, not where the agent may look. `env:NAME` is a variable
    of whoever starts the run. `systemd:NAME` is a credential of the broker's unit. `command:ARGV` is what a command
    prints, without a shell; it counts for five minutes, or until the host says 401. `keyring:NAME` is an entry of the
    service `cloister` (`keyring:SERVICE/NAME` of another). `pass:NAME` is the first line of `pass show`. `login:NAME`
    is a login made by `cloister login`, whose tokens the broker renews.
    For `sigv4` it holds `KEY_ID:SECRET_KEY[:SESSION_TOKEN]`, the lines of an AWS credentials file, or what
    `aws configure export-credentials` prints."""
    inject: Injection | None = None
    """Where it is put on the way out; `keys` need none."""
    env: str = ""
    """The environment variable in which the agent finds the placeholder; `sigv4` sets AWS's two by itself. Without one
    the secret is put into every request to its host that has nothing at its place."""
    mask: bool = False
    """Whether the secret is masked where an answer of its host echoes it."""
    keys: tuple[str, ...] = ()
    """Instead of `secret`: keys of your ssh-agent or gpg-agent that the agent may sign with, each as
    `SHA256:BASE64`, the path of a `.pub` file, or `gpg:FINGERPRINT`."""
    hosts: tuple[str, ...] = ()
    """For `keys`: the hosts that may be logged in to by ssh, as `host` or `host:port`. Their host keys must be in your
    `known_hosts`."""
    uses: tuple[Literal["ssh", "git", "gpg"], ...] = ("ssh",)
    """For `keys`: `ssh` is logging in to `hosts`, `git` signs commits and tags by ssh, `gpg` signs them by gpg."""


class Identity(Table, frozen=True):
    """`[agents.NAME.identity]`: the signed tokens by which a run says who it is."""

    audiences: tuple[str, ...] = ()
    """Third parties the agent may get tokens for, each as its `aud`; empty means none. The tokens are files in
    `$CLOISTER_IDENTITY_DIRECTORY`; see cloister-identity(1)."""
    lifetime: str = "15m"
    """How long a token is valid: from 1 minute to 15 minutes. It is renewed while the run lives."""


class Limits(Table, frozen=True):
    """`[agents.NAME.limits]`: what the run may use up. Core dumps are always off."""

    memory_max: str = ""
    """Memory of all processes together, such as `4G`."""
    tasks_max: Count | None = None
    """Processes and threads together."""
    cpu_quota: str = ""
    """Share of one CPU, such as `150%`."""
    disk_max: str = ""
    """Size of what the run may write outside the workspace (home, /tmp)."""
    runtime_max: str = ""
    """Time after which the run is ended with exit code 124."""
    open_files: Count | None = None
    """File descriptors per process."""
    enforce: Literal["available", "cgroup"] = "available"
    """`cgroup` refuses to start where no cgroup is to be had; `available` falls back to rlimits and says so."""


class Hardening(Table, frozen=True):
    """`[agents.NAME.hardening]`: layers and named opt-outs. Every opt-out is recorded with the run."""

    nested: bool = False
    """Allow user namespaces and mounts, for agents that bring their own bubblewrap."""
    landlock: Literal["available", "required", "off"] = "available"
    """`required` refuses to start on kernels without Landlock."""
    write_execute: bool = True
    """Whether memory may be writable and executable. Node needs it; `false` sets PR_SET_MDWE (Linux 6.3)."""
    netlink: bool = True
    """Whether AF_NETLINK sockets may be made; Node's `os.networkInterfaces()` needs them."""
    ptrace: bool = False
    """Allow tracing inside the sandbox, for debuggers."""


class AgentSandbox(Table, frozen=True):
    """`[agents.NAME.agent_sandbox]`: the sandbox that the agent itself brings (Claude Code)."""

    managed: bool = False
    """Pass generated settings that switch it on, forbid leaving it, and carry our allowlist. Implies `nested`."""
    deny_read: tuple[str, ...] = ()
    """More paths for its `denyRead` list."""


class Unit(Table, frozen=True):
    """`[agents.NAME.unit]`: the system user and its unit, where `isolation = "unit"`; in the system's policy only."""

    ownership: Literal["auto", "idmap", "group"] = "auto"
    """How files of the agent become the user's. `idmap`: by an idmapped mount; `group`: by `project_group`, and
    they stay the account's; `auto`: `idmap`, or `group` where one is named and the kernel has no idmapped mounts."""
    project_group: str = ""
    """A group that owns the workspace, with setgid directories that it may write; the user must be in it."""
    block: tuple[str, ...] = ()
    """More networks (CIDR) that the packet filter refuses to this agent, in mode `internet`."""
    firewall: tuple[str, ...] = ()
    """More statements of nft(8) for this agent's packets, such as `tcp dport 22 counter reject`. They refuse or
    count, and never concern others' packets."""
    io_weight: Annotated[int, msgspec.Meta(ge=1, le=10000)] | None = None
    """Share of the disks' time, against 100 of everything else."""
    oom: Literal["stop", "continue", "kill"] = "kill"
    """What happens to the others when one process is killed for lack of memory (systemd.service(5), OOMPolicy=)."""


class MicroVm(Table, frozen=True):
    """`[agents.NAME.microvm]`: the guest, where `isolation = "microvm"`."""

    image: str = ""
    """The name of a signed guest image; empty means that of the preset, and `dev` where it names none."""
    memory: str = ""
    """Memory of the guest, such as `2G`."""
    cpus: Count | None = None
    """Virtual CPUs of the guest."""
    disk: str = ""
    """Size of the guest's writable disk, such as `8G`."""
    disk_rate: str = ""
    """What each of the guest's disks may move in a second, such as `200M`; without it, as much as the host gives."""
    ports: tuple[Port, ...] = ()
    """Ports of the guest's 127.0.0.1 that are reachable on the same ports of the host's: a gateway in the guest."""
    monitor: Literal["auto", "firecracker", "qemu"] = "auto"
    """The virtual machine monitor; `auto` takes Firecracker where KVM really works."""
    warm: bool = True
    """Start from a template where there is one: a guest of this image that has booted and was told nothing yet, made
    after the first start. `false` boots each guest; its kernel then lies at addresses of its own."""
    network: Literal["none", "bridge"] = "none"
    """`none`: no network device, the proxy is reached over the guest's channel. `bridge`: the guest has eth0 as well,
    on the system's bridge, and reaches its own run's proxy there and nothing else; needs `[microvm]` of the system's
    policy."""


class Agent(Table, frozen=True):
    """`[agents.NAME]`: who runs, and everything it may do."""

    preset: str = ""
    """An agent product's known paths, variables and hosts: claude, pi, codex, openclaw, shell or one of yours."""
    isolation: Isolation = "namespace"
    """How strong: `namespace` (bubblewrap), `unit` (own system user under systemd) or `microvm`."""
    command: tuple[str, ...] = ()
    """What to run, instead of the preset's command; arguments of the command line are appended."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables to set; `{home}`, `{workspace}` and `{proxy}` are filled in. Secrets belong into `credentials`."""
    environment_files: tuple[str, ...] = ()
    """Files of variables, `NAME=value` lines as `.env` files have them, read at every start: they win over
    `environment`, and a later file over an earlier one. What is named or looks like a secret is refused: those belong
    into `credentials`."""
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """Settings of the product, laid over those in the home for the time of a run: tables are merged, everything else
    is replaced. Only for products whose preset names a file of settings: Claude Code, Pi and Codex."""
    pass_environment: tuple[str, ...] = ()
    """Names of variables carried in from the caller, such as `EDITOR`."""
    carry: tuple[str, ...] = ()
    """Paths below the home that are carried in read-only, such as `~/.gitconfig`, besides the preset's."""
    sandbox_note: bool = True
    """Tell the model in a short note what it cannot reach."""
    git_identity: bool = True
    """Carry `user.name`, `user.email` and `safe.directory` in."""
    environment_audit: bool = True
    """Show on a terminal which variables are carried in, and ask, before an interactive start; `--yes` skips."""
    workspace: Workspace = Workspace()
    """The directory it works in."""
    filesystem: Filesystem = Filesystem()
    """What else of the host it may see."""
    egress: Egress = Egress()
    """What it may reach."""
    credentials: dict[str, Credential] = msgspec.field(default_factory=dict)
    """Secrets it may use without seeing them, by name."""
    identity: Identity = Identity()
    """Tokens by which it proves to others who it is."""
    llm: Llm = Llm()
    """Which models, and how much of them."""
    limits: Limits = Limits()
    """What the run may use up."""
    hardening: Hardening = Hardening()
    """Layers and named opt-outs."""
    agent_sandbox: AgentSandbox = AgentSandbox()
    """The sandbox that the agent itself brings."""
    unit: Unit = Unit()
    """The system user and its unit, where `isolation = "unit"`."""
    microvm: MicroVm = MicroVm()
    """The guest, where `isolation = "microvm"`."""


class User(Table, frozen=True):
    """`[users.NAME]`: which agents a user may start, and where; in the system's policy only."""

    agents: tuple[str, ...] = ()
    """Agents this user may start; at least one."""
    roots: tuple[str, ...] = ()
    """Directories below which the user may start them; at least one. `~` is that user's home, and what a
    bare name lies in."""
    config: str | dict[str, str] = ""
    """Where below the home the user keeps an agent's configuration, if not at the product's own place: by agent, as in
    `{ pi = "dotfiles/pi" }`, or one directory for all of them."""


class MicroVms(Table, frozen=True):
    """`[microvm]`: the bridge of microVMs with `network = "bridge"`; in the system's policy only."""

    bridge: str = ""
    """Its network, a /24 of private addresses; 10.0.0.0/24 when left out. Where this host has the network elsewhere,
    the next free one of a list is taken, and `cloister status` says which."""
    users: tuple[str, ...] = ()
    """Users whose microVMs may be connected to it. Without any there is no bridge."""


class Images(Table, frozen=True):
    """`[images]`: which guest images are trusted."""

    require_signature: bool = True
    """Refuse images that are not signed by a trusted key."""
    trust: tuple[str, ...] = ()
    """Ed25519 public keys, in hexadecimal."""
    store: str = ""
    """Directory of your own images; empty means `~/.local/share/cloister/images`. The system's are found as well."""


class Audit(Table, frozen=True):
    """`[audit]`: how much is recorded and where it goes."""

    syscalls: Literal["off", "security", "all"] = "security"
    """Which system calls are recorded where the audit daemon runs."""
    fallback: Literal["none", "seccomp"] = "none"
    """Where no kernel events are to be had (no audit daemon, or a guest with a kernel of its own): `seccomp` has
    launched programs and connections told by the sandbox's first process, which costs each such call a detour."""
    hashes: bool = False
    """Record the SHA-256 of what is executed. The sandbox's first process tells it, as with `fallback`."""
    on_failure: Literal["stop", "alarm"] = "stop"
    """What happens to the runs when the audit cannot be written: `stop` ends them and starts none, `alarm` lets them
    go on and says so."""
    syslog: str = ""
    """Where events are sent: `unix` (the host's journal), `udp://host:514`, `tcp://host:601` or `tls://host:6514`."""
    format: Literal["cef", "cef1", "ocsf", "json"] = "cef"
    """What a message of syslog holds: CEF version 0 or 1, OCSF, or the line of the log itself."""
    otlp: str = ""
    """Where events are sent as OpenTelemetry logs, over HTTP: `https://host:4318`."""
    alarm: str = ""
    """Where detections are sent whose `action` is `alarm` or `stop`: a receiver as in `syslog`, or `file:PATH`, a file
    with the address of a webhook, which is often a secret."""
    ca: str = ""
    """File with certificates of the authorities that receivers are trusted by; else the system's are."""
    certificate: str = ""
    """File with a certificate and its key for receivers that ask for one."""
    retention: str = "90d"
    """How long records are kept."""
    rules: tuple[DetectionRule, ...] = ()
    """Detections of your own, besides those that come with Cloister (`cloister audit rules` lists them)."""
    detections: dict[str, Literal["off", "record", "alarm", "stop"]] = msgspec.field(default_factory=dict)
    """What becomes of a detection that comes with Cloister, by its name; `off` switches it off."""
    rotate_size: str = "64M"
    """A segment of the log ends at this size, from 64K; closed ones are compressed."""
    rotate_every: str = "1d"
    """A segment of the log ends after this time, also when it is small."""


class Policy(Table, frozen=True):
    """A whole policy file."""

    schema: int
    """The version of this format: 1. It comes first."""
    providers: dict[str, Provider] = msgspec.field(default_factory=dict)
    """Where model traffic goes, by name."""
    agents: dict[str, Agent] = msgspec.field(default_factory=dict)
    """Who may run, by name."""
    profiles: dict[str, Agent] = msgspec.field(default_factory=dict)
    """`[profiles.NAME]`: keys laid over an agent's by `cloister run --profile NAME AGENT`."""
    users: dict[str, User] = msgspec.field(default_factory=dict)
    """System policy only: who may start what."""
    services: dict[str, Service] = msgspec.field(default_factory=dict)
    """System policy only: agents that run for months, as gateways."""
    microvm: MicroVms = MicroVms()
    """System policy only: the bridge of microVMs."""
    images: Images = Images()
    """Which guest images are trusted."""
    audit: Audit = Audit()
    """How much is recorded."""
    ledger: Ledger = Ledger()
    """Where the calls of models are written down."""


class Project(Table, frozen=True):
    """`.cloister.toml` in a workspace: it may only tighten (`tighten`)."""

    schema: int
    """The version of this format: 1. It comes first."""
    every_agent: Agent = Agent()
    """Keys for whichever agent is started here."""
    agents: dict[str, Agent] = msgspec.field(default_factory=dict)
    """Keys for one agent, after those of `every_agent`."""


class Preset(Table, frozen=True):
    """A preset file: what is known about one agent product. The agent's own table adds to it or overrides it."""

    schema: int
    """The version of this format: 1. It comes first."""
    description: str = ""
    """One line for `cloister init`."""
    command: tuple[str, ...] = ()
    """The program, found on the caller's PATH, and arguments it always gets."""
    image: str = ""
    """The guest image that has the program, for `isolation = "microvm"`."""
    state: tuple[str, ...] = ()
    """Directories below the home in which the agent keeps its history; private per agent and project, and kept."""
    carry: tuple[str, ...] = ()
    """Files and directories below the home carried in read-only, where they exist."""
    secrets: tuple[str, ...] = ()
    """Files below the home that hold secrets: never carried in, even when a parent directory is."""
    settings: str = ""
    """The file below the home with the product's settings, what `settings` of an agent is laid over: TOML where its
    name ends so, with its comments kept; else JSON."""
    environment_file: str = ""
    """A file of variables below the home. They count least, and secrets in it stay out."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables set in the sandbox; `{home}`, `{workspace}`, `{proxy}` are filled in."""
    pass_environment: tuple[str, ...] = ()
    """Names of variables carried in from the caller: never secrets."""
    key_environment: tuple[str, ...] = ()
    """Names of variables in which the product takes a model key; `cloister init` and the audit know them by this."""
    base_url: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables that point the agent at another model endpoint, by protocol."""
    base_url_arguments: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Arguments that do so, where there is no such variable; `{base_url}` is the endpoint."""
    placeholder: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Variables in which the product takes a key, by protocol: where its model traffic goes through Cloister they hold
    a placeholder."""
    model_providers: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Entries for `{providers}` in `model_files`, by protocol; `{base_url}` is the endpoint, `{models}` a JSON list of
    the models that the policy names exactly. An entry with `{models}` is left out where it names none."""
    model_files: dict[str, str] = msgspec.field(default_factory=dict)
    """Files to write below the home at every start with models, where neither variables nor arguments will do;
    `{providers}` are the entries above, `{protocol}` is that of the first provider, `{model}` the first model that the
    policy names exactly (without one, a file that needs it is not written), `{base_url}` the endpoint, no version."""
    unix_socket: str = ""
    """The variable in which the agent takes a Unix socket for model traffic, if it knows one; it gets the run's own."""
    hosts: tuple[str, ...] = ()
    """Hosts the product needs, as `egress.allow` entries."""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Files to write below the home at every start, with their content."""
    seed: dict[str, str] = msgspec.field(default_factory=dict)
    """Files to write below the home only where they do not exist yet, with their content."""
    protect: tuple[str, ...] = ()
    """Paths below the workspace that this product loads as configuration."""
    write_execute: bool = True
    """Whether its memory may be writable and executable."""
    netlink: bool = True
    """Whether it needs AF_NETLINK sockets."""
    note: tuple[str, ...] = ()
    """Arguments by which the sandbox note reaches the model; `{note}` is the text."""
    note_file: str = ""
    """The file below the home that holds the note, for products without such arguments; replaced at every start."""
    subcommands: tuple[str, ...] = ()
    """First arguments with which the product takes no note, such as `install`."""
    login: Login | None = None
    """How `cloister login` gets tokens for it."""
