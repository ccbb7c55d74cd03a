"""`[services.NAME]`: agents that run for months as gateways, one or several instances of each.

Values only, in the system's policy only; what they must hold together is for `service_check`, and which
instances come of them for `service_instances`. What a gateway may reach and use stands in the table
of its agent; here is what it serves, whom it talks to and what it is told. Names and defaults are those of
the OpenClaw modules for NixOS where they have the thing (docs/services.md has the list).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from cloister.policy.injection import Injection
from cloister.policy.table import Port, Table

Thinking = Literal["off", "minimal", "low", "medium", "high", "xhigh", "adaptive", "max", "ultra"]
QueueMode = Literal["interrupt", "queue", "steer", "followup", "collect"]

DEFAULT_PORT = 18789
DEFAULT_MODEL = "anthropic/claude-sonnet-4-20250514"


class ServiceModel(Table, frozen=True):
    """`[services.NAME.model]`: the model it talks with unless somebody asks for another."""

    primary: str = DEFAULT_MODEL
    """`PROVIDER/MODEL`; the provider is one of `[providers]` that the agent may use."""
    thinking: Thinking = "high"
    """How long it thinks before it answers."""


class Telegram(Table, frozen=True):
    """`[services.NAME.channels.telegram]`: talking to people through a bot of Telegram."""

    enable: bool = False
    """Whether the channel is open."""
    bot_token: str = ""
    """A secret reference to the bot's token: `file:/PATH`, or `systemd:NAME` for a credential in systemd's store. The
    gateway gets a placeholder; the token is put into its requests on their way out."""
    api_root: str = "https://api.telegram.org"
    """Where the Bot API is served; the agent's `egress.allow` must name that host."""
    allow_from: tuple[str | int, ...] = ()
    """Who may talk to it: numbers of users, or names such as `@name`."""
    groups: dict[str, Any] = msgspec.field(default_factory=dict)
    """Groups it takes part in, by number, each with a table that the gateway itself checks."""
    dm_policy: Literal["allowlist", "pairing", "open", "disabled"] = "allowlist"
    """Who besides `allow_from` may write to it directly. `allowlist`: nobody; `pairing`: whoever is approved by
    OpenClaw's own command; `open`: everybody; `disabled`: nobody at all."""


class Channels(Table, frozen=True):
    """`[services.NAME.channels]`: where people talk to it."""

    telegram: Telegram = Telegram()
    """A bot of Telegram."""
    other: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    """Other channels by the gateway's own names, such as `discord`, each with a table that the gateway itself checks.
    A text `{secret:NAME}` in it is the secret of that name in `secrets`."""


class Auth(Table, frozen=True):
    """`[services.NAME.auth]`: what somebody who opens its port must know."""

    mode: Literal["token", "password"] = "token"
    """Which of the two."""
    token: str = ""
    """A secret reference, `file:/PATH` or `systemd:NAME`."""
    password: str = ""
    """A secret reference, `file:/PATH` or `systemd:NAME`."""


class Queue(Table, frozen=True):
    """`[services.NAME.routing.queue]`: what happens to a message while it works on another."""

    mode: QueueMode = "interrupt"
    """`interrupt` stops what it does; `queue` and `followup` let the message wait; `collect` joins those;
    `steer` hands it to the work under way."""
    by_channel: dict[str, QueueMode] = msgspec.field(
        default_factory=lambda: {"telegram": "interrupt", "discord": "queue", "webchat": "queue"}
    )
    """The same for single channels."""


class Routing(Table, frozen=True):
    """`[services.NAME.routing]`: how messages reach the model."""

    queue: Queue = Queue()
    """Messages while it works."""


class Documents(Table, frozen=True):
    """`[services.NAME.documents]`: what it is told about itself, in files of its workspace."""

    directory: str = ""
    """A directory of root's with AGENTS.md (or CLAUDE.md), SOUL.md and TOOLS.md. Inside they are read-only, and what
    stands there is what the directory had at the last `cloister apply`."""
    writable: tuple[str, ...] = ()
    """Names among them that it may change: they are put there once, when they are missing."""


class Skill(Table, frozen=True):
    """`[[services.NAME.skills]]`: one skill, declared as a whole; a skill that is not declared any more is gone."""

    name: str
    """The name of its directory."""
    mode: Literal["copy", "inline"] = "copy"
    """`inline`: SKILL.md is made of the keys below; `copy`: of the directory `source`. (Links are not supported.)"""
    description: str = ""
    """What it is for."""
    homepage: str = ""
    """Where more is to be read."""
    body: str = ""
    """The text below SKILL.md's front matter."""
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    """The gateway's own words about the skill (`metadata.openclaw`)."""
    source: str = ""
    """A directory of root's that is copied."""


class ServicePlugin(Table, frozen=True):
    """`[services.NAME.plugins.NAME]`: skills, programs and state together; NAME is that of its `plugin.toml`."""

    source: str
    """A directory of root's with `plugin.toml` in it (docs/services.md)."""
    enable: bool = True
    """Whether it is there."""
    env: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables it needs, each with a secret reference; inside each names a file that holds the secret."""
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """Written as JSON to `config.json` in the first of its state directories."""


class Tools(Table, frozen=True):
    """`[services.NAME.tools]`: programs of the host, and the report of them in TOOLS.md."""

    include: tuple[str, ...] = ()
    """Programs that must be there, by their names in /usr/bin or /bin; TOOLS.md lists them."""
    exclude: tuple[str, ...] = ()
    """Programs that are taken away, by their names in /usr/bin or /bin."""


class ServiceSecret(Table, frozen=True):
    """`[services.NAME.secrets.NAME]`: a secret that never comes inside, for channels that send it in a request."""

    secret: str
    """A secret reference, `file:/PATH` or `systemd:NAME`."""
    inject: Injection
    """Where it is put on the way out, as for a credential of an agent; inside, a placeholder stands for it."""
    mask: bool = False
    """Whether the secret is masked where an answer of its host echoes it."""


class Instance(Table, frozen=True):
    """`[services.NAME.instances.NAME]`: the keys of `[services.NAME]`, laid over those; lists replace lists."""

    agent: str = ""
    """The agent whose sandbox, egress, models, credentials and limits it has; `isolation = "unit"`."""
    enable: bool = False
    """Whether it is started with the host and kept running. Instances are, unless they say `false`."""
    port: Port = DEFAULT_PORT
    """The loopback port it serves; gateways of OpenClaw need 120 ports of distance."""
    ready: str = ""
    """A path of its port, such as `/healthz`, that answers 2xx when it is ready. Not for OpenClaw, which is asked for
    an answer of its model; of another program without it, nobody knows."""
    restart: Literal["always", "on-failure", "no"] = "always"
    """When it is started again after it ended."""
    model: ServiceModel = ServiceModel()
    """The model it talks with."""
    channels: Channels = Channels()
    """Where people talk to it."""
    auth: Auth = Auth()
    """Who may open its port."""
    routing: Routing = Routing()
    """How messages reach the model."""
    documents: Documents = Documents()
    """What it is told about itself."""
    skills: tuple[Skill, ...] = ()
    """Skills it has."""
    plugins: dict[str, ServicePlugin] = msgspec.field(default_factory=dict)
    """What is added to it."""
    tools: Tools = Tools()
    """Programs of the host."""
    secrets: dict[str, str | ServiceSecret] = msgspec.field(default_factory=dict)
    """More secrets by name, for `{secret:NAME}` in `channels.other` and `config_overrides`: a reference, whose secret
    comes inside as a file, or a table with `inject`, of which a placeholder does. Of programs other than OpenClaw they
    are the files `secret-NAME` in the directory `$CLOISTER_SECRETS`."""
    config_overrides: dict[str, Any] = msgspec.field(default_factory=dict)
    """Laid over the gateway's configuration as it is made of all other keys; tables are merged, lists replaced. Never
    secrets: `{secret:NAME}` stands for one."""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables of the gateway and of all its tools. Never secrets."""
    environment_files: tuple[str, ...] = ()
    """Files with variables (systemd.exec(5), EnvironmentFile=), root's; `-` before a path ignores a missing one."""


class Service(Instance, frozen=True):
    """`[services.NAME]`: a gateway, in the system's policy only. Without `instances` it is one, named `default`."""

    instances: dict[str, Instance] = msgspec.field(default_factory=dict)
    """Several of the same kind, each with its own user, port, state and workspace."""
