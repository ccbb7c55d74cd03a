"""A policy with two OpenClaw gateways, and the facts of a made-up host, for tests of what is rendered for them."""

from __future__ import annotations

from collections.abc import Mapping

from cloister.plan.service_facts import ProgramFacts, ServiceFacts, ServiceFile, ServiceUnits, SourceFile
from cloister.plan.unit import Account
from cloister.policy.document import read
from cloister.policy.load import load_document
from cloister.policy.presets import builtin_presets
from cloister.runs.service_files import render_service_units

POLICY = """\
schema = 1

[providers.anthropic]
key = "file:/etc/cloister/keys/anthropic"

[agents.claw]
preset = "openclaw"
isolation = "unit"

[agents.claw.llm]
providers = ["anthropic"]
models = ["claude-*", "claude-haiku-4-5"]

[services.home]
agent = "claw"
model.thinking = "low"
auth.token = "file:/etc/cloister/keys/gateway"
documents.directory = "/etc/cloister-docs"
documents.writable = ["SOUL.md"]
tools = { include = ["git"], exclude = ["curl"] }
secrets.discord = "systemd:discord"
secrets.slack = { secret = "systemd:slack", inject = { host = "slack.com", scheme = "bearer" } }
channels.other.discord = { enabled = true, token = "{secret:discord}" }
channels.other.slack = { enabled = true, botToken = "{secret:slack}" }
config_overrides.logging.level = "debug"
config_overrides.messages.queue.mode = "steer"
environment.GREETING = 'a "b" %c $d \\'
environment_files = ["-/etc/default/claw"]

[services.home.channels.telegram]
enable = true
bot_token = "file:/etc/cloister/keys/telegram"
allow_from = [123, "@ann"]

[[services.home.skills]]
name = "greet"
mode = "inline"
description = "say: hello"
homepage = "https://example.org"
body = "Say hello."
metadata = { emoji = "x" }

[[services.home.skills]]
name = "copied"
source = "/etc/skills/copied"

[services.home.plugins.notes]
source = "/etc/plugins/notes"
env.NOTES_KEY = "file:/etc/cloister/keys/no tes%"
settings = { depth = 3 }

[services.home.instances.a]

[services.home.instances.b]
port = 19000
"""

SOURCES: dict[str, dict[str, SourceFile]] = {
    "/etc/cloister-docs": {
        "CLAUDE.md": SourceFile(text="# Who you are\n"),
        "SOUL.md": SourceFile(text="# Soul\n"),
        "TOOLS.md": SourceFile(text="# Tools\n"),
        "notes.txt": SourceFile(text="not a document\n"),
    },
    "/etc/skills/copied": {
        "SKILL.md": SourceFile(text="---\nname: copied\n---\n"),
        "scripts/run.sh": SourceFile(text="#!/bin/sh\n", executable=True),
    },
    "/etc/plugins/notes": {
        "plugin.toml": SourceFile(
            text='name = "notes"\nskills = ["skills/note"]\npackages = ["bin"]\n'
            'state_dirs = [".notes"]\nrequired_env = ["NOTES_KEY"]\n'
        ),
        "skills/note/SKILL.md": SourceFile(text="---\nname: note\n---\n"),
        "bin/note": SourceFile(text="#!/bin/sh\n", executable=True),
    },
}
ACCOUNTS = {
    "home-a": Account(name="cl-home-a", uid=1_900_000_000, agent="claw", service="home-a"),
    "home-b": Account(name="cl-home-b", uid=1_900_000_001, agent="claw", service="home-b"),
    "home": Account(name="cl-home", uid=1_900_000_002, agent="claw", service="home"),
}
FACTS = ServiceFacts(
    systemd=257,
    machine="x86_64",
    shim="/opt/cloister/bin/cloister",
    links={"bin": "usr/bin"},
    programs={
        "claw": ProgramFacts(
            path="/opt/openclaw/openclaw.mjs",
            binds=("/opt/openclaw",),
            names=(("node", "/opt/openclaw/node"), ("openclaw", "/opt/openclaw/openclaw.mjs")),
        )
    },
    sources=SOURCES,
    tools=frozenset({"git"}),
)


def rendered(policy: str = POLICY, facts: ServiceFacts = FACTS) -> Mapping[str, ServiceUnits]:
    """Return what is installed for each gateway of a policy, by `Gateway.joined`."""
    document = read(policy, "cloister.toml")
    presets = builtin_presets()
    made = render_service_units(
        document, load_document(document, preset_names=tuple(presets)), presets, ACCOUNTS, facts
    )
    return {units.joined: units for units in made}


def files(units: ServiceUnits) -> dict[str, ServiceFile]:
    """Return the files by their paths, those below the tree by their relative ones."""
    tree = f"/var/lib/cloister/services/{units.account}.d/"
    return {file.path.removeprefix(tree).removeprefix("/etc/systemd/system/"): file for file in units.files}
