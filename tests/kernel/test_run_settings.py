"""Settings and variables of the policy and of the home in a whole run: who wins, what is stored, runs side by side."""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest

from support.cloister import User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

POLICY = """\
schema = 1

[agents.pi]
preset = "pi"
environment_audit = false
sandbox_note = false
environment = { A = "managed", B = "managed" }
environment_files = ["~/one.env"]

[agents.pi.settings]
defaultModel = "managed"
nested = { managed = 1 }

[profiles.other.settings]
defaultModel = "other"
"""
SHOW = 'cat ~/.pi/agent/settings.json; echo; echo "$A $B $C $D"'


@pytest.fixture
def pi(user: User) -> User:
    """A user with settings and variables of Pi in the home."""
    user.write_policy(POLICY)
    agent = user.home / ".pi/agent"
    agent.mkdir(parents=True, exist_ok=True)
    (agent / "settings.json").write_text('{"defaultModel": "host", "nested": {"host": 1}, "apiKey": "made-up-secret"}')
    (agent / ".env").write_text("A=host\nC=host\nD=host\nPATH=/evil\n")
    (user.home / "one.env").write_text("B=file\nC=file\n")
    return user


def shown(done: subprocess.CompletedProcess[str]) -> tuple[object, str]:
    """Return the settings and the line of variables that a run printed."""
    text, _, line = done.stdout.rstrip("\n").rpartition("\n")
    return json.loads(text), line


def test_policy_over_home_and_files_over_policy(pi: User, workspace: Path) -> None:
    """Settings: home < policy, recursively. Variables: home's file < policy's < policy's files."""
    done = pi.inside(SHOW, cwd=workspace, agent="pi")
    settings, line = shown(done)

    assert settings == {"defaultModel": "managed", "nested": {"host": 1, "managed": 1}, "apiKey": "made-up-secret"}
    assert line == "managed file file host"
    assert (pi.home / ".pi/agent/settings.json").read_text().startswith('{"defaultModel": "host"')
    pi.close()


def test_what_is_taken_out_of_the_policy_is_gone(pi: User, workspace: Path) -> None:
    """Flaw PF13: settings of the policy stayed in the agent's state for ever. And without any, the home's count."""
    assert pi.inside(SHOW, cwd=workspace, agent="pi").returncode == 0
    pi.write_policy(POLICY.split("environment =", maxsplit=1)[0])
    settings, line = shown(pi.inside(SHOW, cwd=workspace, agent="pi"))

    assert settings == {"defaultModel": "host", "nested": {"host": 1}, "apiKey": "made-up-secret"}
    assert line == "host  host host"
    pi.close()


def test_runs_side_by_side_have_each_their_own_settings(pi: User, workspace: Path) -> None:
    """Flaw PF11: runs overwrote each other's settings. Twelve at once, of two profiles; their history is one."""
    script = 'echo x >> ~/.pi/agent/history; sleep 0.3; grep -o "managed\\",\\|other\\"," ~/.pi/agent/settings.json'
    started = [
        (
            profile,
            subprocess.Popen(
                pi.command("run", *(["--profile", "other"] if profile else []), "pi", "--", "/bin/sh", "-c", script),
                cwd=workspace, env=pi.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            ),
        )
        for profile in (False, True) * 6
    ]  # fmt: skip
    for profile, one in started:
        assert one.communicate(timeout=60)[0] == ('other",\n' if profile else 'managed",\n')
    assert pi.inside("wc -l < ~/.pi/agent/history", cwd=workspace, agent="pi").stdout.strip() == "12"
    pi.close()


def test_nothing_of_a_file_is_stored(pi: User, workspace: Path) -> None:
    """Neither settings of the home nor values of files stand in plans or records."""
    (pi.home / ".pi/agent/.env").write_text("D=canary-of-home\n")
    (pi.home / "one.env").write_text("B=canary-of-file\n")
    settings, line = shown(pi.inside(SHOW, cwd=workspace, agent="pi"))
    assert line == "managed canary-of-file  canary-of-home"
    for directory, _, files in os.walk(pi.home / ".local/state/cloister"):
        for path in (Path(directory, name) for name in files):
            stored = path.read_bytes() if path.is_file() else b""
            assert b"canary-of" not in stored, path
            assert b"made-up-secret" not in stored, path
    assert isinstance(settings, dict)
    pi.close()


def test_mistakes_are_said_before_anything_starts(pi: User, workspace: Path) -> None:
    """A broken file of the policy refuses the run; broken settings of the home are named and the run goes on."""
    (pi.home / "one.env").write_text("LD_PRELOAD=/x\n")
    refused = pi.inside("touch ran", cwd=workspace, agent="pi")
    assert refused.returncode == 125
    assert "LD_PRELOAD" in refused.stderr
    assert not (workspace / "ran").exists()
    (pi.home / "one.env").write_text("")
    (pi.home / ".pi/agent/settings.json").write_text("{ oops")
    done = pi.inside(SHOW, cwd=workspace, agent="pi")
    assert shown(done)[0] == {"defaultModel": "managed", "nested": {"managed": 1}}
    assert "only the policy's settings count" in done.stderr
    pi.close()


def test_settings_for_a_product_without_a_file_are_refused(user: User, workspace: Path) -> None:
    """They would reach nobody."""
    user.write_policy('schema = 1\n[agents.shell]\npreset = "shell"\nsettings = { a = 1 }\n')
    done = user.inside("true", cwd=workspace)
    assert done.returncode == 125
    assert "settings-without-file" in done.stderr
    user.close()


CODEX = """\
schema = 1

[agents.codex]
preset = "codex"
environment_audit = false

[agents.codex.settings]
model = "managed"
tui = { theme = "managed" }
"""


def test_toml_settings_are_merged_with_their_comments(user: User, workspace: Path) -> None:
    """Codex's config.toml: the policy over the home, whose own values and comments stay; the home's is as it was."""
    user.write_policy(CODEX)
    (user.home / ".codex").mkdir(exist_ok=True)
    own = '# mine\nmodel = "host"\n\n[tui]\nanimations = false # calm\n'
    (user.home / ".codex/config.toml").write_text(own)
    text = user.inside("cat ~/.codex/config.toml; touch ~/.codex/history", cwd=workspace, agent="codex").stdout
    assert tomllib.loads(text) == {"model": "managed", "tui": {"animations": False, "theme": "managed"}}
    assert "# mine\n" in text
    assert "# calm\n" in text
    assert (user.home / ".codex/config.toml").read_text() == own
    (user.home / ".codex/config.toml").write_text("model = ")
    done = user.inside("cat ~/.codex/config.toml", cwd=workspace, agent="codex")
    assert tomllib.loads(done.stdout) == {"model": "managed", "tui": {"theme": "managed"}}
    assert "~/.codex/config.toml is not TOML: only the policy's settings count" in done.stderr
    user.close()


MODELS = """
[providers.fake]
protocol = "anthropic"
base_url = "http://127.0.0.1:1"
key = "file:~/.config/cloister/model.key"

[agents.pi.llm]
providers = ["fake"]
models = ["m"]
"""
OWN = {"providers": {
    "own": {"baseUrl": "http://own.example/v1", "api": "openai-completions", "apiKey": "made-up-secret", "models": []},
    "anthropic": {"baseUrl": "https://elsewhere.example", "headers": {"X-Key": "made-up-secret"}, "compat": {}},
}}  # fmt: skip


def test_a_users_own_models_are_there_without_their_keys(pi: User, workspace: Path) -> None:
    """With `llm` the policy's providers lie over them; keys stay outside, in records as well, and that is said."""
    pi.write_policy(POLICY + MODELS)
    key = pi.home / ".config/cloister/model.key"
    key.write_text("made-up-key\n")
    key.chmod(0o600)
    (pi.home / ".pi/agent/models.json").write_text(json.dumps(OWN))
    done = pi.inside("cat ~/.pi/agent/models.json", cwd=workspace, agent="pi")
    providers = json.loads(done.stdout)["providers"]
    assert providers["own"] == {"baseUrl": "http://own.example/v1", "api": "openai-completions", "models": []}
    assert providers["anthropic"]["baseUrl"].startswith("http://127.0.0.1:11435")
    assert providers["anthropic"]["compat"] == {}
    assert providers["cloister-anthropic"]["apiKey"] == "$CLOISTER_MODEL_KEY"
    assert "made-up-secret" not in done.stdout
    notices = json.loads(pi.run("receipt", "last", "--json", cwd=workspace).stdout)["notices"]
    assert any("without providers.own.apiKey, providers.anthropic.headers" in notice for notice in notices)
    for directory, _, files in os.walk(pi.home / ".local/state/cloister"):
        for path in (Path(directory, name) for name in files):
            assert not path.is_file() or b"made-up-secret" not in path.read_bytes(), path
    pi.write_policy(POLICY)
    without = pi.inside("cat ~/.pi/agent/models.json", cwd=workspace, agent="pi")
    assert "own.example" not in without.stdout, "without models of the policy they are withheld as before"
    pi.close()
