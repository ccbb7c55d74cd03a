"""What of a user's home reaches an agent with a uid of its own: read by the user, made anew by root."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator

import pytest

from support import installed
from support.installed import Leftovers
from support.machines import Machine

POLICY = """\
schema = 1

[agents.pi]
preset = "pi"
isolation = "unit"
command = ["bash"]
sandbox_note = false
environment = { A = "managed", B = "managed" }
environment_files = ["/etc/cloister/pi.env"]

[agents.pi.settings]
defaultModel = "managed"
nested = { managed = 1 }

[providers.fake]
protocol = "anthropic"
base_url = "http://127.0.0.1:1"
key = "file:/etc/cloister/keys/model"

[agents.asking]
preset = "pi"
isolation = "unit"
command = ["bash"]
llm = { providers = ["fake"], models = ["m"] }

[agents.codex]
preset = "codex"
isolation = "unit"
command = ["bash"]
settings = { model = "managed", tui = { theme = "managed" } }

[users.alice]
agents = ["pi", "codex", "asking"]
roots = ["~/src"]
config = { pi = "dotfiles/pi" }

[users.bob]
agents = ["pi"]
roots = ["~/src"]
"""
SHOW = 'cat ~/.pi/agent/settings.json; echo "$A $B $C $D"; cat ~/.pi/agent/skills/*/SKILL.md; find ~/.pi/agent -type f'


@pytest.fixture(scope="module")
def host(suite: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which alice and bob may start Pi, each with files of their own."""
    layers = request.getfixturevalue("layers")
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"home-{suite}")) as machine:
        machine.write("/etc/cloister/pi.env", "B=file\nC=file\n")
        machine.write("/etc/cloister/keys/model", "made-up-key\n", 0o600)
        installed.install(machine, POLICY)
        for user, place in (("alice", "dotfiles/pi"), ("bob", ".pi/agent")):
            folder = f"/home/{user}/{place}"
            write = {
                "settings.json": json.dumps({"defaultModel": user, "nested": {"host": user}}),
                "auth.json": "made-up-secret",
                ".env": f"A={user}\nC={user}\nD={user}\nMY_TOKEN=made-up-secret\nPATH=/evil\n",
                "skills/one/SKILL.md": f"skill of {user}\n",
                "skills/one/auth.json": "not a secret",
            }
            for name, text in write.items():
                machine.write(f"{folder}/{name}", text, 0o600, owner=user)
            machine.run(["mkdir", "-p", f"/home/{user}/src/project"], user=user)
        yield machine


def run(machine: Machine, script: str, user: str = "alice", agent: str = "pi") -> str:
    """Run a script in a user's project as the account of an agent."""
    command = ["cloister", "run", "--yes", agent, "--", "bash", "-c", script]
    return str(machine.run(command, user=user, cwd=f"/home/{user}/src/project").stdout)


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_settings_variables_and_skills_of_each_user_arrive(host: Machine, user: str) -> None:
    """P67 to P70: found where the user keeps them, merged, in the order of their weight; secrets are not there."""
    settings, _, rest = run(host, SHOW, user).partition("}\n")
    settings, _, more = (settings + "}\n" + rest).partition("\n}\n")
    assert json.loads(settings + "}") == {"defaultModel": "managed", "nested": {"host": user, "managed": 1}}
    line, skill, *files = more.splitlines()
    assert line == f"managed file file {user}"
    assert skill == f"skill of {user}"
    names = {name.rpartition(".pi/agent/")[2] for name in files}
    assert {"settings.json", "skills/one/SKILL.md", "skills/one/auth.json"} <= names
    assert not {"auth.json", ".env"} & names


def test_the_agent_cannot_write_what_was_carried_in(host: Machine) -> None:
    """It is root's and read-only; and nothing of a run's is left when it is over."""
    before = Leftovers(host)
    told = run(
        host,
        "cd ~/.pi/agent; echo x >> settings.json; rm -rf skills; ls skills; touch ok && echo kept",
    )
    assert told.splitlines() == ["one", "kept"]
    before.check()
    assert run(host, "ls ~/.pi/agent/ok | wc -l").strip() == "1"


@pytest.mark.parametrize("link", [".env", "settings.json", "skills/leak"])
def test_a_link_to_roots_files_brings_nothing_of_them(host: Machine, link: str) -> None:
    """Flaws PF2 to PF4: links to files that only root can read; root reads and changes nothing there."""
    host.write("/etc/only-root", "ROOTS=made-up-secret\n", 0o600)
    path = f"/home/bob/.pi/agent/{link}"
    host.run(["sh", "-c", f"mv {path} {path}.aside 2>/dev/null; ln -s /etc/only-root {path}"], user="bob")
    try:
        told = run(host, "cat ~/.pi/agent/settings.json ~/.pi/agent/skills/leak; env; true", "bob")
    finally:
        host.run(["sh", "-c", f"rm {path}; mv {path}.aside {path} 2>/dev/null; true"], user="bob")
    assert "made-up-secret" not in told
    assert '"managed": 1' in told
    assert host.run(["stat", "-c", "%U %a", "/etc/only-root"]).stdout == "root 600\n"


def test_runs_of_one_user_and_of_two_do_not_meet(host: Machine) -> None:
    """Flaw PF11: one state for all users. Six at once: each has its own user's files and history."""
    script = f"{SHOW}; echo $0 >> ~/.pi/agent/history; sleep 0.5"
    started = [
        (user, host.popen(
            ["cloister", "run", "--yes", "pi", "--", "bash", "-c", script, user],
            user=user, cwd=f"/home/{user}/src/project", stdin=-3, stdout=-1, stderr=-2, text=True,
        ))
        for user in ("alice", "bob") * 3
    ]  # fmt: skip
    for user, one in started:
        told = one.communicate(timeout=60)[0]
        other = "bob" if user == "alice" else "alice"
        assert f'"host": "{user}"' in told, told
        assert other not in told
    for user in ("alice", "bob"):
        assert set(run(host, "cat ~/.pi/agent/history", user).split()) == {user}


def test_broken_settings_and_files_are_said_aloud(host: Machine) -> None:
    """Flaw PF13; and a file of the policy that sets what loads code refuses the run."""
    path = "/home/bob/.pi/agent/settings.json"
    host.run(["sh", "-c", f"cp {path} {path}.aside; echo '{{' > {path}"], user="bob")
    try:
        command = ["cloister", "run", "--yes", "pi", "--", "bash", "-c", "cat ~/.pi/agent/settings.json"]
        done = host.run(command, user="bob", cwd="/home/bob/src/project")
        assert json.loads(done.stdout) == {"defaultModel": "managed", "nested": {"managed": 1}}
        assert "only the policy's settings count [file-not-read]" in done.stderr
    finally:
        host.run(["mv", f"{path}.aside", path], user="bob")
    host.write("/etc/cloister/pi.env", "NODE_OPTIONS=--require=/x\n")
    try:
        done = host.run(command, user="bob", cwd="/home/bob/src/project", check=False)
        assert done.returncode == 125
        assert "NODE_OPTIONS" in done.stderr
    finally:
        host.write("/etc/cloister/pi.env", "B=file\nC=file\n")


def test_toml_settings_and_models_of_the_user_are_merged(host: Machine) -> None:
    """Codex's config.toml with alice's comments, Pi's models.json without her keys: under the policy's."""
    assert tomllib.loads(run(host, "cat ~/.codex/config.toml", agent="codex")) == {
        "model": "managed", "tui": {"theme": "managed"},
    }  # fmt: skip
    host.write("/home/alice/.codex/config.toml", 'model = "alice"\n[tui] # hers\nx = 1\n', 0o600, owner="alice")
    text = run(host, "cat ~/.codex/config.toml", agent="codex")
    assert tomllib.loads(text) == {"model": "managed", "tui": {"theme": "managed", "x": 1}}
    assert "# hers" in text
    alone = json.loads(run(host, "cat ~/.pi/agent/models.json", agent="asking"))
    own = {"providers": {"own": {"baseUrl": "http://own.example", "apiKey": "made-up-secret"}}}
    host.write("/home/alice/.pi/agent/models.json", json.dumps(own), 0o600, owner="alice")
    both = json.loads(run(host, "cat ~/.pi/agent/models.json", agent="asking"))
    assert both == {"providers": {**alone["providers"], "own": {"baseUrl": "http://own.example"}}}
    assert "cloister-anthropic" in alone["providers"]
