"""The policy as values: every table and key of `cloister.toml`, for all three backends.

One Struct per table, all frozen, all refusing keys they do not know. This is the only place
where a key, its type and its default are written down; the JSON Schema and
`cloister.toml(5)` are generated from it, and the docstring of an attribute is its manual
text. Reading files, merging presets and reporting mistakes is for `load`; what values may
be combined is for `check`. A key stands here even when no backend enforces it yet: the
compiler refuses it then (`runs/compile.py`), it never ignores it.

Names follow systemd in snake_case where systemd has the thing (`memory_max` is
`MemoryMax=`). Sizes are "512M", "4G" (powers of 1024); durations "90s", "10m", "8h", "2d".
"""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA = 1

Isolation = Literal["namespace", "unit", "microvm"]
EgressMode = Literal["deny", "ask", "learn", "internet"]
Protocol = Literal["anthropic", "openai", "openai-responses"]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all tables share: frozen values, and unknown keys are mistakes."""


class Provider(Table):
    """`[providers.NAME]`: where model traffic goes and which secret opens it."""

    protocol: Protocol = "anthropic"
    """The wire protocol the upstream speaks."""
    base_url: str = ""
    """The upstream's address; empty means the provider's public one. `http://` is allowed for loopback only."""
    key: str = ""
    """A secret reference such as `file:~/.config/cloister/anthropic.key`; never the secret itself."""


class Workspace(Table):
    """`[agents.NAME.workspace]`: the directory the agent works in."""

    roots: tuple[str, ...] = ()
    """Directories below which the agent may be started; `~` is the caller's home; the longest root wins.
    Empty means: the project directory (the top of the git work tree, else the current directory)."""
    mode: Literal["direct", "overlay"] = "direct"
    """`direct` writes to the directory itself; `overlay` keeps changes aside until `cloister apply`."""
    protect: tuple[str, ...] = ()
    """More paths below the workspace that stay read-only, present or not."""
    unprotected: tuple[str, ...] = ()
    """Names from the built-in protection list to leave writable, such as `.vscode`. The audit records it."""


class Filesystem(Table):
    """`[agents.NAME.filesystem]`: what else of the host the agent may see. Everything not named is not there."""

    read: tuple[str, ...] = ()
    """Host paths visible read-only."""
    write: tuple[str, ...] = ()
    """Host paths visible and writable."""
    hide: tuple[str, ...] = ()
    """Paths below the workspace or below `read` and `write` that are masked: empty and unreadable."""


class EgressRule(Table):
    """One entry of `egress.allow` or `egress.deny` in its long form."""

    host: str
    """A name, `*.name` (any label below it, not the name itself), or an address or CIDR."""
    port: int = 443
    """The TCP port, 1 to 65535."""
    methods: tuple[str, ...] = ()
    """HTTP methods allowed; empty means all. Needs plain HTTP or a credential bound to the host."""
    paths: tuple[str, ...] = ()
    """Path patterns (`/repos/**`); empty means all."""


class Egress(Table):
    """`[agents.NAME.egress]`: what the agent may reach. The default is nothing."""

    mode: EgressMode = "deny"
    """`deny` outside the allowlist, `ask` the user, `learn` (public hosts, recorded), or `internet` (addresses too)."""
    allow: tuple[str | EgressRule, ...] = ()
    """Rules `host`, `host:port` or the long form. Presets add their own hosts."""
    deny: tuple[str | EgressRule, ...] = ()
    """Rules that win over `allow`, `ask` and `learn`."""
    private: tuple[str, ...] = ()
    """Exceptions inside the refused ranges (one NAS, one test server), as CIDR; a name must be allowed as well."""
    upstream_proxy: str = ""
    """`http://host:port` to go through, `env` for the broker's own `https_proxy`, empty for none."""


class Injection(Table):
    """How a secret is put into a request towards the one host it is bound to."""

    host: str
    header: str = ""
    query: str = ""
    value: str = "{secret}"
    scheme: Literal["header", "bearer", "basic", "query", "sigv4", "git", "npm", "pip"] = "header"


class Credential(Table):
    """`[agents.NAME.credentials.NAME]`: a secret the agent may use without seeing it."""

    secret: str
    """`file:`, `env:`, `systemd:`, `command:`, `keyring:` or `pass:` reference."""
    inject: Injection | None = None
    env: str = ""
    """Environment variable in which the agent finds the placeholder."""


class Llm(Table):
    """`[agents.NAME.llm]`: which models, and how much of them."""

    providers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    concurrency: int | None = None
    max_tokens: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    cost_per_run_usd: float | None = None
    cost_per_day_usd: float | None = None
    cost_per_month_usd: float | None = None


class Limits(Table):
    """`[agents.NAME.limits]`: what the run may use up. Core dumps are always off."""

    memory_max: str = ""
    """Memory of all processes together, such as `4G`."""
    tasks_max: int | None = None
    """Processes and threads together."""
    cpu_quota: str = ""
    """Share of one CPU, such as `150%`."""
    disk_max: str = ""
    """Size of what the run may write outside the workspace (home, /tmp)."""
    runtime_max: str = ""
    """Time after which the run is ended with exit code 124."""
    open_files: int | None = None
    """File descriptors per process."""
    enforce: Literal["available", "cgroup"] = "available"
    """`cgroup` refuses to start where no cgroup is delegated; `available` falls back to rlimits and says so."""


class Hardening(Table):
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


class AgentSandbox(Table):
    """`[agents.NAME.agent_sandbox]`: the sandbox that the agent itself brings (Claude Code)."""

    managed: bool = False
    """Pass generated settings that switch it on, forbid leaving it, and carry our allowlist. Implies `nested`."""
    deny_read: tuple[str, ...] = ()
    """More paths for its `denyRead` list."""


class Service(Table):
    """`[agents.NAME.service]`: run as an always-on service (gateway)."""

    enable: bool = False
    port: int | None = None
    restart: Literal["always", "on-failure", "no"] = "always"


class MicroVm(Table):
    """`[agents.NAME.microvm]`: the guest, where `isolation = "microvm"`."""

    image: str = ""
    memory: str = ""
    cpus: int | None = None
    disk: str = ""
    monitor: Literal["auto", "firecracker", "qemu"] = "auto"


class Agent(Table):
    """`[agents.NAME]`: who runs, and everything it may do."""

    preset: str = ""
    """An agent product's known paths, variables and hosts: claude, pi, codex, openclaw, shell or one of yours."""
    isolation: Isolation = "namespace"
    """How strong: `namespace` (bubblewrap), `unit` (own system user under systemd) or `microvm`."""
    command: tuple[str, ...] = ()
    """What to run; arguments of the command line are appended."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables to set. Values are plain text: secrets belong into `credentials`."""
    pass_environment: tuple[str, ...] = ()
    """Names of variables carried in from the caller, such as `EDITOR`."""
    carry: tuple[str, ...] = ()
    """Paths below the home that are carried in read-only, besides the preset's."""
    sandbox_note: bool = True
    """Tell the model in a short note what it cannot reach."""
    git_identity: bool = True
    """Carry `user.name`, `user.email` and `safe.directory` in."""
    environment_audit: bool = True
    """Show on a terminal which variables are carried in, and ask, before an interactive start; `--yes` skips."""
    workspace: Workspace = Workspace()
    filesystem: Filesystem = Filesystem()
    egress: Egress = Egress()
    credentials: dict[str, Credential] = msgspec.field(default_factory=dict)
    llm: Llm = Llm()
    limits: Limits = Limits()
    hardening: Hardening = Hardening()
    agent_sandbox: AgentSandbox = AgentSandbox()
    service: Service = Service()
    microvm: MicroVm = MicroVm()


class User(Table):
    """`[users.NAME]` (system policy): who may start what, and where."""

    agents: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    config: str = ""
    """Directory of the user's own agent configuration, relative to the home."""


class Images(Table):
    """`[images]`: which guest images are trusted."""

    require_signature: bool = True
    trust: tuple[str, ...] = ()


class Audit(Table):
    """`[audit]`: how much is recorded and where it goes."""

    syscalls: Literal["off", "security", "all"] = "security"
    on_failure: Literal["stop", "alarm"] = "stop"
    syslog: str = ""
    retention: str = "90d"


class Policy(Table):
    """A whole policy file."""

    schema: int
    """The version of this format: 1."""
    providers: dict[str, Provider] = msgspec.field(default_factory=dict)
    agents: dict[str, Agent] = msgspec.field(default_factory=dict)
    profiles: dict[str, Agent] = msgspec.field(default_factory=dict)
    """`[profiles.NAME]`: keys laid over an agent's by `cloister run --profile NAME AGENT`."""
    users: dict[str, User] = msgspec.field(default_factory=dict)
    images: Images = Images()
    audit: Audit = Audit()


class Preset(Table):
    """A preset file: what is known about one agent product. Every field can be overridden by the agent's own table."""

    schema: int
    description: str = ""
    command: tuple[str, ...] = ()
    """The program, found on the caller's PATH, and arguments it always gets."""
    state: tuple[str, ...] = ()
    """Directories below the home in which the agent keeps its history; private per agent and project, and kept."""
    carry: tuple[str, ...] = ()
    """Files and directories below the home carried in read-only."""
    secrets: tuple[str, ...] = ()
    """Files below the home that hold secrets: never carried in, even when a parent directory is."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables set in the sandbox; `{home}`, `{workspace}`, `{proxy}` are filled in."""
    pass_environment: tuple[str, ...] = ()
    base_url: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables that point the agent at another model endpoint, by protocol."""
    unix_socket: str = ""
    """The variable in which the agent takes a Unix socket for model traffic, if it knows one."""
    hosts: tuple[str, ...] = ()
    """Hosts the product needs, as `egress.allow` entries."""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Files to write below the home at start, with their content."""
    protect: tuple[str, ...] = ()
    """Paths below the workspace that this product loads as configuration."""
    write_execute: bool = True
    netlink: bool = True
    note: str = ""
    """How the sandbox note reaches the model: a flag (`--append-system-prompt`) or a file below the home."""
