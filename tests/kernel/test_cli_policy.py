"""Verbs about the policy, as a person types them: check, init, agents, policy, and the front door itself."""

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from cloister.cli import manual
from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

BAD = """\
schema = 1

[agents.shell]
preset = "shel"
isolatoin = "namespace"

[agents.shell.egress]
allow = ["ok.example.org", "http://x", "*:443"]

[agents.shell.limits]
memory_max = "lots"
"""


def test_check_reports_every_mistake_of_every_file(user: User, workspace: Path) -> None:
    """All mistakes of policy, preset and project file come at once, each with file and line; the exit code is 78."""
    user.write_policy(BAD)
    presets = user.home / ".config/cloister/presets"
    presets.mkdir()
    (presets / "mine.toml").write_text('schema = 1\ncomand = ["x"]\n')
    done = user.run("check", "--json", cwd=workspace)
    report = json.loads(done.stdout)
    wheres = " ".join(one["where"] for one in report["problems"])

    assert done.returncode == 78
    for place in ("toml:4 .agents.shell.preset", "toml:5 .agents.shell.isolatoin", "mine.toml:2 .comand"):
        assert place in wheres or "preset" in place, place
    assert "did you mean isolation?" in [one["remedy"] for one in report["problems"]]
    assert [file["good"] for file in report["files"]] == [False, False]
    text = user.run("check", cwd=workspace)
    assert text.returncode == 78
    assert "WRONG" in text.stdout
    assert "isolatoin" in text.stderr


def test_check_holds_files_against_each_other(user: User, workspace: Path) -> None:
    """A project file that widens is a mistake; one that tightens is not."""
    (workspace / ".cloister.toml").write_text('schema = 1\n[every_agent.egress]\nallow = ["evil.example.org"]\n')
    widens = user.run("check", cwd=workspace)
    (workspace / ".cloister.toml").write_text("schema = 1\n[every_agent.limits]\ntasks_max = 5\n")
    tightens = user.run("check", cwd=workspace)

    assert widens.returncode == 78
    assert ".cloister.toml:3" in widens.stderr
    assert (tightens.returncode, tightens.stderr) == (0, "")


def test_what_check_warns_of_is_refused_at_the_start(user: User, workspace: Path) -> None:
    """A valid key that nothing enforces is a warning with its line in check and agents, and stops a run."""
    user.write_policy(f"{BASE}\n[agents.shell.microvm]\ncpus = 2\n")
    report = json.loads(user.run("check", "--json", cwd=workspace).stdout)
    agents = json.loads(user.run("agents", "--json", cwd=workspace).stdout)
    run = user.inside("true", cwd=workspace)

    assert [one["where"].split("/")[-1] for one in report["warnings"]] == ["cloister.toml:7 .agents.shell.microvm"]
    assert report["problems"] == []
    assert agents[0]["unenforced"] == ["microvm"]
    assert (run.returncode, "policy-not-enforceable" in run.stderr) == (125, True)
    user.close()


def test_check_knows_what_a_guest_can_keep(user: User, workspace: Path) -> None:
    """An agent for a microVM is no mistake; what no guest can keep is told with its line, before anybody starts it."""
    user.write_policy(f'{BASE}\nisolation = "microvm"\n')
    good = json.loads(user.run("check", "--json", cwd=workspace).stdout)
    listed = json.loads(user.run("agents", "--json", cwd=workspace).stdout)
    user.write_policy(f'{BASE}\nisolation = "microvm"\n[agents.shell.egress]\nmode = "internet"\n')
    warned = json.loads(user.run("check", "--json", cwd=workspace).stdout)["warnings"]
    agents = json.loads(user.run("agents", "--json", cwd=workspace).stdout)

    assert ["image" in one["message"] for one in good["warnings"]] == [True], "this home has no image, and that is all"
    assert (good["problems"], listed[0]["unenforced"]) == ([], [])
    assert len(warned) == 2
    assert (".agents.shell.egress.mode" in warned[0]["where"], "will not start" in warned[0]["message"]) == (True, True)
    assert agents[0]["unenforced"] == ["egress.mode"]


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_check_refuses_a_policy_others_can_write(user: User, workspace: Path, mode: int) -> None:
    """The user's own file must be out of others' reach, as for a start; 0600 is right."""
    policy = user.home / ".config/cloister/cloister.toml"
    policy.chmod(mode)
    bad = user.run("check", cwd=workspace)
    policy.chmod(0o600)

    assert (bad.returncode, "can be written by others" in bad.stderr) == (78, True)
    assert user.run("check", cwd=workspace).returncode == 0


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", b"schema = 1\n" * 2, b"[" * 9999, b"{", b""])
def test_check_survives_any_file(user: User, workspace: Path, content: bytes) -> None:
    """Nonsense is one clear error with code 78, never a traceback; so are a directory and a missing file."""
    (workspace / "draft.toml").write_bytes(content)
    for name in ("draft.toml", ".", "missing"):
        done = user.run("check", name, cwd=workspace)
        assert done.returncode == 78
        assert "Traceback" not in done.stderr


def test_init_writes_once_and_keeps_what_it_replaces(user: User, workspace: Path) -> None:
    """The first policy loads, is private, and is never replaced unasked; --force keeps the old one."""
    folder = user.home / ".config/cloister"
    (folder / "cloister.toml").unlink()
    folder.rmdir()
    missing = user.run("check", cwd=workspace)
    first = user.run("init", "--agents", "claude,pi", cwd=workspace)
    policy = folder / "cloister.toml"
    assert (missing.returncode, "cloister init" in missing.stderr) == (78, True)
    assert first.returncode == 0, first.stderr
    assert (policy.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert user.run("check", cwd=workspace).returncode == 0
    policy.write_text(policy.read_text() + "# mine\n")
    again = user.run("init", cwd=workspace)
    assert (again.returncode, "policy-exists" in again.stderr) == (64, True)
    assert policy.read_text().endswith("# mine\n")
    forced = json.loads(user.run("init", "--force", "--agents", "shell", "--json", cwd=workspace).stdout)

    assert Path(forced["backup"]).read_text().endswith("# mine\n")
    assert "[agents.shell]" in policy.read_text()
    assert [row["name"] for row in json.loads(user.run("agents", "--json", cwd=workspace).stdout)] == ["shell"]


def test_init_says_how_to_store_a_key(user: User, workspace: Path) -> None:
    """The key that the caller has goes into a file by the command that is shown, and never into the policy."""
    key = "made-up-key-of-the-caller"
    first = user.run("init", "--force", "--agents", "claude", cwd=workspace, ANTHROPIC_API_KEY=key)
    command = next(line for line in first.stdout.splitlines() if line.startswith("store the key of anthropic: "))
    words = ["sh", "-c", command.partition(": ")[2]]
    subprocess.run(words, env=user.environment | {"ANTHROPIC_API_KEY": key}, check=True, timeout=20)
    stored = user.home / ".config/cloister/anthropic.key"
    again = user.run("init", "--force", "--agents", "claude", cwd=workspace, ANTHROPIC_API_KEY=key)

    assert (stored.read_text().strip(), stored.stat().st_mode & 0o777) == (key, 0o600)
    assert key not in (user.home / ".config/cloister/cloister.toml").read_text() + first.stdout
    assert "store the key" not in again.stdout
    assert user.run("check", cwd=workspace).returncode == 0


def test_init_printed_writes_nothing_and_bad_names_are_refused(user: User, workspace: Path) -> None:
    """--print only prints; an unknown preset names those there are."""
    policy = user.home / ".config/cloister/cloister.toml"
    before = policy.read_text()
    printed = user.run("init", "--print", "--agents", "codex", cwd=workspace)
    unknown = user.run("init", "--force", "--agents", "claud", cwd=workspace)

    assert "[agents.codex]" in printed.stdout
    assert policy.read_text() == before
    assert (unknown.returncode, "claude, codex" in unknown.stderr) == (64, True)


def test_an_agent_is_shown_with_the_lines_it_comes_from(user: User, workspace: Path) -> None:
    """Policy show folds preset and profile in and says where a key was written; schema and presets are JSON."""
    user.write_policy(f"{BASE}\n[profiles.careful.limits]\ntasks_max = 7\n")
    shown = user.run("policy", "show", "shell", "--profile", "careful", cwd=workspace)
    schema = json.loads(user.run("policy", "schema", cwd=workspace).stdout)
    presets = json.loads(user.run("policy", "presets", "--json", cwd=workspace).stdout)
    unknown = user.run("policy", "show", "nobody", "--json", cwd=workspace)

    assert ".limits.tasks_max" in shown.stdout
    assert "cloister.toml:8 .profiles.careful.limits.tasks_max" in shown.stdout
    assert "preset shell" in shown.stdout
    assert "Agent" in schema["$defs"]
    assert {"claude", "pi", "codex", "openclaw", "shell"} <= set(presets)
    assert (unknown.returncode, json.loads(unknown.stdout)["error"]["reference"]) == (78, "agent-unknown")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("rnu",), "cloister run"),
        (("recipt", "last"), "cloister receipt"),
        (("ps", "--al"), "did you mean --all?"),
        (("stop", "--gracee", "1s", "last"), "did you mean --grace?"),
        (("gc", "--older-than", "soon"), "duration"),
        (("policy", "relaod"), "did you mean reload?"),
        (("explain", "shell"), "required"),
        (("inspect", "--argv", "--plan", "last"), "not allowed with"),
    ],
)
def test_typing_mistakes_get_a_suggestion(user: User, workspace: Path, words: tuple[str, ...], hint: str) -> None:
    """A wrong verb, option or value is one error with code 64 that says what was meant."""
    done = user.run(*words, cwd=workspace)

    assert done.returncode == 64
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", manual.described_verbs())
def test_every_verb_has_help(user: User, workspace: Path, verb: str) -> None:
    """--help, -h and `cloister help VERB` print usage and an example, with exit code 0."""
    for words in ((verb, "--help"), (verb, "-h"), ("help", verb)):
        done = user.run(*words, cwd=workspace)
        assert done.returncode == 0
        assert f"usage: cloister {verb}" in done.stdout
        assert "examples:" in done.stdout


def test_colours_are_for_terminals_that_want_them(user: User, workspace: Path) -> None:
    """Colour on a terminal; none with NO_COLOR, on a dumb terminal, or into a pipe."""

    def shown(**environment: str) -> bytes:
        ours, theirs = pty.openpty()
        subprocess.run(
            user.command("check"), cwd=workspace, env={**user.environment, **environment}, stdout=theirs, check=True
        )
        os.close(theirs)
        data = os.read(ours, 4096)
        os.close(ours)
        return data

    assert b"\x1b[32mok" in shown(TERM="xterm")
    assert b"\x1b" not in shown(TERM="xterm", NO_COLOR="1")
    assert b"\x1b" not in shown(TERM="dumb")
    assert "\x1b" not in user.run("check", cwd=workspace, TERM="xterm").stdout


def test_an_old_encoding_is_no_bug(user: User, workspace: Path) -> None:
    """Where the locale cannot hold a character it is escaped, and nothing fails."""
    user.write_policy(f'{BASE}\n[agents.other]\ncommand = ["true", "漢字"]\n')
    done = user.run("agents", cwd=workspace, LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

    assert done.returncode == 0
    assert "\\u6f22" in done.stdout
