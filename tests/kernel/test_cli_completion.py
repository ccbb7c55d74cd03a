"""Completion in real shells: bash offers what it should, and what a file is called is never run."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = pytest.mark.kernel

TRY = """
source <(cloister completion bash)
words=("$@")
COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
_cloister
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def shell(user: User) -> User:
    """A user whose PATH holds `cloister`."""
    folder = user.home / "bin"
    folder.mkdir()
    command = " ".join(f"'{word}'" for word in user.command())
    (folder / "cloister").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    (folder / "cloister").chmod(0o755)
    user.environment["PATH"] = f"{folder}:{user.environment['PATH']}"
    return user


def _complete(user: User, cwd: Path, *words: str) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", TRY, "bash", "cloister", *words],
        cwd=cwd, env=user.environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("rece",), {"receipt"}),
        (("ps", "--a"), {"--all"}),
        (("run", ""), {"shell", "other"}),
        (("run", "--yes", "o"), {"other"}),
        (("plan", "--profile", ""), {"careful"}),
        (("policy", "sh"), {"show"}),
        (("policy", "show", ""), {"shell", "other"}),
        (("explain", "shell", "READ"), {"README"}),
        (("run", "shell", "--", "READ"), {"README"}),
        (("run", "-C", "READ"), {"README"}),
        (("logs", "--zzz"), set()),
        (("logs", ""), set()),
    ],
)
def test_bash_offers_what_fits(shell: User, workspace: Path, words: tuple[str, ...], expected: set[str]) -> None:
    """Verbs, options, agents, profiles, actions and files complete in their places."""
    shell.write_policy(f'{BASE}\n[agents.other]\ncommand = ["true"]\n[profiles.careful.egress]\nmode = "deny"\n')

    assert _complete(shell, workspace, *words) == expected


def test_bash_offers_runs(shell: User, workspace: Path) -> None:
    """Ids of runs and `last` are offered; `stop` offers only what lives."""
    assert shell.inside("true", cwd=workspace).returncode == 0
    run = shell.records()[0]["id"]

    assert _complete(shell, workspace, "logs", "") == {run, "last"}
    assert _complete(shell, workspace, "receipt", run[:4]) == {run}
    assert _complete(shell, workspace, "stop", "") == set()


def test_names_in_a_policy_are_not_run(shell: User, workspace: Path) -> None:
    """An agent called $(touch ...) in a policy, or a run's directory called so, is not offered and not executed."""
    shell.write_policy(f"{BASE}\n[agents.'$(touch {workspace}/owned)']\n")
    runs = shell.state / "runs"
    runs.mkdir(parents=True)
    (runs / "$(touch owned)").mkdir()

    assert _complete(shell, workspace, "run", "") == {"shell"}
    _complete(shell, workspace, "logs", "")
    assert not (workspace / "owned").exists()


def test_a_broken_policy_is_silent(shell: User, workspace: Path) -> None:
    """Completion never prints an error into somebody's command line."""
    shell.write_policy("not = [toml")

    assert _complete(shell, workspace, "run", "") == set()


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_scripts_parse(shell: User, workspace: Path, name: str) -> None:
    """Each script is valid for its shell, where the shell is installed."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    script = workspace / "script"
    script.write_text(shell.run("completion", name, cwd=workspace).stdout)

    done = subprocess.run([name, "-n", str(script)], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
