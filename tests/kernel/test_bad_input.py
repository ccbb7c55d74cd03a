"""Bad input of every kind gets one clear error, and nothing is left behind."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cloister.host.owner import identify
from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def _refused(done: subprocess.CompletedProcess[str], reference: str, code: int = 125) -> None:
    """Check one clear error: reference, code, no traceback."""
    assert done.returncode == code, done.stderr
    assert f"[{reference}]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        (["run"], "agent-missing"),
        (["run", "--profil", "x", "shell"], "option-unknown"),
        (["run", "--profile"], "value-missing"),
        (["run", "nobody"], "agent-unknown"),
        (["run", "a/b"], "agent-unknown"),
        (["run", "a\nb"], "agent-unknown"),
        (["run", "%s%n"], "agent-unknown"),
        (["run", "x" * 300], "agent-unknown"),
        (["run", "--profile", "none", "shell"], "profile-unknown"),
        (["run", "shell", "--"], "command-missing"),
        (["run", "-C", "/nonexistent", "shell"], "directory-unusable"),
        (["run", "-C", "/", "shell", "--", "true"], "workspace-system"),
        (["run", "-C", "/tmp", "shell", "--", "true"], "workspace-system"),
        (["exec", "nothere", "true"], "run-not-alive"),
        (["exec"], "run-missing"),
        (["run", "--env", "LD_PRELOAD", "shell", "--", "true"], "environment-name"),
        (["run", "--env", "CLOISTER_MASTER_KEY", "shell", "--", "true"], "environment-name"),
    ],
)
def test_bad_words(user: User, workspace: Path, words: list[str], reference: str) -> None:
    """Wrong words on the command line are refused by name."""
    _refused(user.run(*words, cwd=workspace), reference)
    user.close()


def test_an_unknown_verb_has_a_suggestion(user: User, workspace: Path) -> None:
    """A typo in the verb names the nearest one."""
    done = user.run("rnu", cwd=workspace)

    _refused(done, "verb-unknown", 64)
    assert "cloister run" in done.stderr
    user.close()


def test_no_policy_says_what_to_type(user: User, workspace: Path) -> None:
    """Without a policy nothing runs, and the remedy is a command."""
    (user.home / ".config/cloister/cloister.toml").unlink()
    done = user.inside("true", cwd=workspace)

    _refused(done, "policy-missing")
    assert "cloister init" in done.stderr
    user.close()


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("schema = 1\n[agents.shell]\npreset = 'shel'\n", "policy-invalid"),
        ("schema = 1\n[agents.shell]\negres = {}\n", "policy-invalid"),
        ("schema = 2\n", "policy-invalid"),
        ("not toml at all [", "policy-unreadable"),
        ("schema = 1\n[agents.shell]\npreset = 'shell'\nisolation = 'unit'\n", "unit-needs-system-policy"),
        ("schema = 1\n[agents.shell]\npreset = 'shell'\nmicrovm = { cpus = 2 }\n", "policy-not-enforceable"),
        ("schema = 1\n[agents.shell]\npreset = 'shell'\nfilesystem = { read = ['/nonexistent/x'] }\n", "path-missing"),
        (
            "schema = 1\n[agents.shell]\npreset = 'shell'\nworkspace = { roots = ['~/other'] }\n",
            "workspace-outside-roots",
        ),
        (BASE + "[agents.shell.llm]\nproviders = ['x']\n", "policy-invalid"),
        (BASE + "[agents.shell.llm]\nproviders = ['x']\n[providers.x]\nauth = 'google'\n", "key-missing"),
        (BASE + "[users.somebody-else]\nagents = ['shell']\nroots = ['~/src']\n", "user-not-allowed"),
    ],
)
def test_bad_policies(user: User, workspace: Path, text: str, reference: str) -> None:
    """A policy with a mistake, or with something nobody enforces, starts nothing."""
    user.write_policy(text)
    _refused(user.inside("touch made", cwd=workspace), reference)
    assert not (workspace / "made").exists()
    user.close()


@pytest.mark.parametrize(("target", "key"), [(".config", "read"), (".local", "write"), (".", "read"), ("..", "read")])
def test_no_link_shows_our_own_files_or_the_home(user: User, workspace: Path, target: str, key: str) -> None:
    """What counts is what would be mounted, not how it is spelled; a link to something else is fine."""
    (user.home / ".local/state/cloister").mkdir(parents=True)
    (user.home / "data").mkdir()
    (user.home / "alias").symlink_to(user.home / target)
    (user.home / "other").symlink_to(user.home / "data")
    user.write_policy(BASE + f"filesystem = {{ {key} = ['~/alias'] }}\n")
    _refused(user.inside("true", cwd=workspace), "path-reserved")
    user.write_policy(BASE + f"filesystem = {{ {key} = ['~/other'] }}\n")
    assert user.inside("ls ~/other", cwd=workspace).returncode == 0
    user.close()


def test_a_policy_others_can_write_is_refused(user: User, workspace: Path) -> None:
    """Permissions count: a policy that another user could have written is none."""
    (user.home / ".config/cloister/cloister.toml").chmod(0o666)
    _refused(user.inside("true", cwd=workspace), "policy-untrusted")
    user.close()


def test_a_project_file_may_only_tighten(user: User, workspace: Path) -> None:
    """A repository's own file that asks for more is refused; one that asks for less is obeyed."""
    (workspace / ".cloister.toml").write_text('schema = 1\n[every_agent.egress]\nmode = "internet"\n')
    widened = user.inside("true", cwd=workspace)
    (workspace / ".cloister.toml").write_text('schema = 1\n[every_agent.limits]\nruntime_max = "1s"\n')
    tightened = user.inside("sleep 20", cwd=workspace)

    assert widened.returncode == 125
    assert "Traceback" not in widened.stderr
    assert tightened.returncode == 124
    user.close()


def test_the_home_is_no_workspace(user: User, home: Path) -> None:
    """The home itself, and a directory above it, are refused."""
    _refused(user.inside("true", cwd=home), "workspace-home")
    _refused(user.inside("true", cwd=home.parent), "workspace-home")
    user.close()


def test_clumsy_directory_names_work(user: User, home: Path) -> None:
    """Spaces, colons, percent signs, quotes, backslashes and leading dashes in a path are just a path."""
    folder = home / "src" / "-a b:c%d'e\"f\\g"
    folder.mkdir(parents=True)
    done = user.inside("pwd; echo x > y", cwd=folder)

    assert done.stdout == f"{folder}\n", done.stderr
    assert (folder / "y").exists()
    user.close()


def test_a_workspace_below_var_tmp_works(user: User) -> None:
    """/var/tmp is a link inside only where nothing has to be mounted below it."""
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/var/tmp"))
    try:
        done = user.inside("pwd; echo x > y", cwd=folder)
        made = (folder / "y").exists()
    finally:
        shutil.rmtree(folder)

    assert (done.stdout, made) == (f"{folder}\n", True), done.stderr
    user.close()


@pytest.mark.parametrize("name", ["new\nline", "bell\a"])
def test_control_characters_in_a_workspace_are_refused(user: User, home: Path, name: str) -> None:
    """A path that could forge a line of a log or a mount table is no workspace."""
    folder = home / "src" / name
    folder.mkdir(parents=True)
    done = user.inside("true", cwd=folder)

    _refused(done, "workspace-name")
    assert name not in done.stderr
    user.close()


def test_a_workspace_that_is_not_utf8_is_refused(user: User, home: Path) -> None:
    """Bytes that are no text are refused by name, not by a traceback."""
    folder = os.path.join(os.fsencode(home), b"src", b"\xff\xfe")
    os.makedirs(folder)
    done = subprocess.run(
        user.command("run", "shell", "--", "true"), cwd=folder, env=user.environment, capture_output=True,
        encoding="utf-8", errors="backslashreplace", timeout=60, check=False,
    )  # fmt: skip

    _refused(done, "workspace-name")
    user.close()


def test_a_directory_as_standard_output_is_refused(user: User, workspace: Path) -> None:
    """A directory descriptor would open the host's files by openat(2); the interpreter refuses one as input itself."""
    descriptor = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    program = "from cloister.cli.entry import main; os.dup2(int(sys.argv[1]), 1); sys.exit(main(sys.argv[2:]))"
    script = f"import os, sys; {program}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(descriptor), "run", "shell", "--", "true"], cwd=workspace,
            env=user.environment, pass_fds=(descriptor,), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(descriptor)

    _refused(done, "stdio-directory")
    user.close()


def test_a_long_argument_and_a_large_environment_pass(user: User, workspace: Path) -> None:
    """A prompt of 100 KiB is an argument like any other."""
    prompt = "x" * 100_000
    done = user.run("run", "shell", "--", "sh", "-c", "echo ${#1}", "sh", prompt, cwd=workspace)

    assert done.stdout == "100000\n", done.stderr
    user.close()


def test_users_are_bound_to_their_agents_and_roots(user: User, workspace: Path) -> None:
    """A policy with `[users]` admits who is named, for the named agents, below the named directories; nobody else."""
    name = identify(str(user.home)).name
    table = f"[users.{name}]\nagents = ['shell']\nroots = ['~/src']\n"
    user.write_policy(BASE + "[agents.other]\npreset = 'shell'\n" + table)
    elsewhere = user.home / "elsewhere"
    elsewhere.mkdir()

    assert user.inside("true", cwd=workspace).returncode == 0
    _refused(user.inside("true", cwd=workspace, agent="other"), "agent-not-allowed")
    _refused(user.inside("true", cwd=elsewhere), "workspace-outside-roots")
    user.close()


def test_retention_is_obeyed_and_so_allowed(user: User, workspace: Path) -> None:
    """The one key of `[audit]` that has an effect does not stop a run."""
    user.write_policy(BASE + "[audit]\nretention = '30d'\n")
    assert user.inside("true", cwd=workspace).returncode == 0
    user.close()


def test_a_provider_that_no_agent_uses_stops_nothing(user: User, workspace: Path) -> None:
    """Providers are for agents that name them: the others run as before, and no key of theirs is looked for."""
    user.write_policy(BASE + "[providers.x]\nprotocol = 'anthropic'\nkey = 'file:~/key'\n")
    assert user.inside("true", cwd=workspace).returncode == 0
    user.close()


def test_extra_roots_name_the_missing_ones(user: User, workspace: Path) -> None:
    """Outside all roots, the error lists what is allowed and what is configured but missing."""
    user.write_policy(BASE + '[agents.shell.workspace]\nroots = ["~/gone", "~/src"]\n')
    inside = user.inside("true", cwd=workspace)
    outside_folder = user.home / "elsewhere"
    outside_folder.mkdir()
    outside = user.inside("true", cwd=outside_folder)

    assert inside.returncode == 0, inside.stderr
    _refused(outside, "workspace-outside-roots")
    assert "missing: ~/gone" in outside.stderr
    user.close()


def test_a_symlinked_root_is_not_followed(user: User, home: Path, workspace: Path) -> None:
    """A root that is a link counts as missing: whoever can replace it does not choose the workspace."""
    (home / "link").symlink_to(workspace)
    user.write_policy(BASE + '[agents.shell.workspace]\nroots = ["~/link"]\n')

    _refused(user.inside("true", cwd=workspace), "workspace-outside-roots")
    user.close()
