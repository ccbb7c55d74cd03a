"""The data that ships with the policy: presets, protected names, units, secret shapes, users."""

from __future__ import annotations

import pytest

from cloister.errors import DeniedError, PolicyError
from cloister.policy.document import read
from cloister.policy.load import load
from cloister.policy.merge import resolve
from cloister.policy.presets import BUILTIN, all_presets, builtin_preset, builtin_presets
from cloister.policy.protected import effective_names, protected_names
from cloister.policy.secretscan import audit_environment, looks_secret, names_secret
from cloister.policy.units import parse_cpu, parse_duration, parse_size
from cloister.policy.users import admit

MAX_ALWAYS = 16


@pytest.mark.parametrize("name", BUILTIN)
def test_every_preset_loads_and_resolves(name):
    """Each preset is a valid file, and an agent that only names it can be resolved."""
    document = read(f'schema = 1\n[agents.a]\npreset = "{name}"\n', "p.toml")
    resolved = resolve(document, "a", presets=builtin_presets())
    assert resolved.agent.command
    assert resolved.agent.egress.mode == "deny"
    assert builtin_preset(name).description


@pytest.mark.parametrize("name", BUILTIN)
def test_no_preset_carries_a_secret(name):
    """A preset's own list never names a secret file, nor passes a variable that holds a key."""
    preset = builtin_preset(name)
    assert not set(preset.carry) & set(preset.secrets)
    assert not set(preset.pass_environment) & set(preset.key_environment)
    assert not any(names_secret(variable) for variable in preset.pass_environment if "TOKENS" not in variable)


@pytest.mark.parametrize(("name", "path"), [
    ("claude", ".claude/.credentials.json"),
    ("claude", ".claude.json"),
    ("pi", ".pi/agent/auth.json"),
    ("pi", ".pi/agent/mcp-oauth"),
    ("codex", ".codex/auth.json"),
    ("openclaw", ".openclaw/openclaw.json"),
])  # fmt: skip
def test_known_secret_files_are_withheld(name, path):
    """PF12: secrets are named by anchored paths, so nothing else of that name is lost."""
    assert path in builtin_preset(name).secrets


@pytest.mark.parametrize("name", BUILTIN)
def test_node_agents_keep_what_they_need(name):
    """OpenClaw and Pi abort without writable and executable memory, and so does npm inside any agent."""
    assert builtin_preset(name).write_execute
    assert builtin_preset(name).netlink


def test_a_users_preset_adds_or_replaces_by_name():
    """A user can bring presets, and put one in the place of ours."""
    presets = all_presets({"mine": "schema = 1\nhosts = ['a.example']\n", "pi": b"schema = 1\n"})
    assert presets["mine"].hosts == ("a.example",)
    assert presets["pi"].state == ()
    assert presets["claude"] == builtin_preset("claude")
    with pytest.raises(PolicyError):
        all_presets({"mine": "schema = 1\nhosts = ['*']\n"})


def test_an_unknown_builtin_preset_is_a_key_error():
    """No file is opened for a name that is not ours, such as one with slashes."""
    with pytest.raises(KeyError):
        builtin_preset("../../etc/passwd")


def test_the_always_tier_is_small_and_explained():
    """Each name that is protected while absent costs a mount, so the list is bounded; each has its reason."""
    names = protected_names()
    always = [entry.name for entry in names if entry.when == "always"]
    assert len(always) <= MAX_ALWAYS
    assert len({entry.name for entry in names}) == len(names)
    assert all(entry.why for entry in names)
    assert {".vscode", ".claude", ".mcp.json", ".envrc", ".env", ".npmrc", ".husky"} <= set(always)
    assert {".bashrc", ".zshrc", ".profile", ".inputrc", ".gitconfig"} <= {entry.name for entry in names}
    assert all(not entry.content for entry in names if entry.kind == "directory")


def test_protection_follows_the_policy():
    """`unprotected` takes a name out, `protect` adds one, and adding wins."""
    names = {entry.name: entry for entry in effective_names(("deploy", "ci/x.sh", ".bashrc"), (".vscode", ".idea"))}
    assert ".vscode" not in names
    assert (names["deploy"].kind, names["deploy"].when) == ("directory", "always")
    assert names["ci/x.sh"].kind == "file"
    assert names[".bashrc"].when == "always"
    assert ".vscode" in {entry.name for entry in effective_names((".vscode/",), (".vscode",))}
    assert effective_names((), ()) == protected_names()


@pytest.mark.parametrize(
    ("text", "size"), [("1K", 1024), ("512M", 512 * 1024**2), ("4GiB", 4 * 1024**3), ("1T", 2**40)]
)
def test_sizes_are_powers_of_1024(text, size):
    """As in systemd: K, M, G and T."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("8h", 28800), ("2d", 172800), ("1h30m", 5400)]
)
def test_durations_are_seconds(text, seconds):
    """Units may be combined from large to small."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "0M", "-1M", "1.5G", "1m", "1 G", "G", "\u0661G", "1M\n"])
def test_other_sizes_are_refused(text):
    """A size without a unit could mean anything."""
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "1", "0s", "-1s", "1M", "1m1h", "s", "1h ", "infinity"])
def test_other_durations_are_refused(text):
    """A duration without a unit could mean anything."""
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_cpu_shares_are_percent():
    """150% is one and a half CPUs; a bare number is refused."""
    assert parse_cpu("150%") == 150
    for text in ("", "150", "0%", "1.5%", "-5%"):
        with pytest.raises(ValueError, match="CPU"):
            parse_cpu(text)


@pytest.mark.parametrize("value", [
    "sk-ant-api03-" + "A1b2" * 10,
    "ghp_" + "a" * 36,
    "github_pat_" + "a" * 30,
    "AKIAIOSFODNN7EXAMPLE",
    "123456789:" + "A" * 35,
    "-----BEGIN OPENSSH PRIVATE KEY-----\nx",
    "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhIn0abc.x",
    "postgres://u:hunter2@db/x",
    "prefix xoxb-1234567890-abc",
])  # fmt: skip
def test_token_shapes_are_known(value):
    """Keys that people paste into files are recognised."""
    assert looks_secret(value)


@pytest.mark.parametrize("value", [
    "", "claude-haiku-4-5-20251001", "/home/ann/.config/key", "sk-learn", "file:~/.key", "https://a.b:443/x@y",
    "2026-01-01T10:00:00", "postgres://db/x", "1234:5678",
])  # fmt: skip
def test_ordinary_values_are_no_secrets(value):
    """The twin: models, paths, addresses and dates are left alone."""
    assert not looks_secret(value)


def test_the_audit_masks_and_groups():
    """Nothing of a sensitive value is shown, and what is dangerous comes first."""
    key = "sk-ant-api03-" + "x" * 30
    groups = audit_environment(
        {"TERM": "xterm", "ANTHROPIC_API_KEY": key, "EDITOR": "vi\x1b[2J", "NPM_TOKEN": "hunter2", "OTHER": key},
        model_keys=["ANTHROPIC_API_KEY"],
    )
    assert [[variable.name for variable in group.variables] for group in groups] == [
        ["ANTHROPIC_API_KEY"],
        ["NPM_TOKEN", "OTHER"],
        ["EDITOR"],
        ["TERM"],
    ]
    shown = repr(groups)
    assert key not in shown
    assert "hunter2" not in shown
    assert "\\x1b" not in shown
    assert "xterm" in shown


def test_users_of_a_system_policy():
    """Who is named may start what is named; a policy without users is somebody's own."""
    policy = load('schema = 1\n[agents.pi]\npreset = "pi"\n[agents.claude]\npreset = "claude"\n'
                  '[users.ann]\nagents = ["pi"]\nroots = ["~/p"]\n', "p.toml")  # fmt: skip
    found = admit(policy, "ann", "pi")
    assert found is not None
    assert found.roots == ("~/p",)
    with pytest.raises(DeniedError, match="'bob' is not allowed"):
        admit(policy, "bob", "pi")
    with pytest.raises(DeniedError, match="not allowed to use 'claude'"):
        admit(policy, "ann", "claude")
    assert admit(load("schema = 1\n", "p.toml"), "ann", "pi") is None
