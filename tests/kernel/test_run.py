"""`cloister run` end to end: what the agent sees, what comes out, and that nothing stays behind."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from support.cloister import BASE, User
from support.homes import canaries

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.parametrize("code", [0, 1, 7, 124, 125, 255])
def test_exit_codes_are_the_commands_own(user: User, workspace: Path, code: int) -> None:
    """Whatever the command exits with is what the caller gets."""
    assert user.inside(f"exit {code}", cwd=workspace).returncode == code
    user.close()


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
def test_death_by_signal_is_128_and_the_signal(user: User, workspace: Path, number: str, code: int) -> None:
    """A command killed by signal n gives 128+n, as in a shell."""
    assert user.inside(f"kill -{number} $$", cwd=workspace).returncode == code
    user.close()


def test_missing_and_unusable_programs_speak_as_env_does(user: User, workspace: Path) -> None:
    """127 for a program that is not there, 126 for one that cannot be executed, with words for people."""
    (workspace / "data").write_text("no program\n")
    missing = user.run("run", "shell", "--", "no-such-program", cwd=workspace)
    unusable = user.run("run", "shell", "--", "./data", cwd=workspace)

    assert (missing.returncode, unusable.returncode) == (127, 126)
    assert "program-not-found" in missing.stderr
    assert "exec-failed" in unusable.stderr
    user.close()


def test_pipes_are_binary_safe(user: User, workspace: Path) -> None:
    """Every byte value passes through standard input and output unchanged, many times."""
    data = bytes(range(256)) * 20_000
    done = subprocess.run(
        user.command("run", "shell", "--", "cat"), input=data, capture_output=True, cwd=workspace,
        env=user.environment, timeout=60, check=False,
    )  # fmt: skip

    assert done.stdout == data
    assert done.returncode == 0
    user.close()


def test_standard_error_stays_apart(user: User, workspace: Path) -> None:
    """The two outputs are not merged."""
    done = user.inside("echo out; echo err >&2", cwd=workspace)

    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    user.close()


def test_the_home_is_empty_and_the_workspace_is_not(user: User, home: Path, workspace: Path) -> None:
    """No canary of the home can be read; the project can be read and written."""
    theft = "; ".join(f"cat ~/{name}" for name in canaries(home))
    done = user.inside(f"{theft}; ls -A ~; cat README; echo new > made", cwd=workspace)

    assert "a project" in done.stdout
    assert (workspace / "made").read_text() == "new\n"
    assert not [name for name, canary in canaries(home).items() if canary in done.stdout + done.stderr]
    user.close()


def test_the_environment_is_made_from_nothing(user: User, workspace: Path) -> None:
    """A secret in the caller's environment does not reach the agent; what the policy passes does."""
    user.write_policy(BASE + 'pass_environment = ["WANTED"]\n')
    done = user.run("run", "shell", "--", "env", cwd=workspace, SECRET_TOKEN="canary-env", WANTED="yes")

    assert "canary-env" not in done.stdout
    assert "WANTED=yes" in done.stdout.splitlines()
    assert "HTTPS_PROXY=http://127.0.0.1:3128" in done.stdout
    user.close()


def test_an_environment_value_never_stands_in_the_store(user: User, workspace: Path) -> None:
    """The plan and the receipt name inherited variables and hold no value of them."""
    user.write_policy(BASE + 'pass_environment = ["WANTED"]\n')
    user.run("run", "shell", "--", "true", cwd=workspace, WANTED="canary-value")

    for path in user.state.rglob("*"):
        if path.is_file():
            assert b"canary-value" not in path.read_bytes(), path
    assert any("WANTED" in path.read_text() for path in user.state.glob("runs/*/plan.json"))
    user.close()


def test_only_the_proxy_is_reachable(user: User, workspace: Path) -> None:
    """Without the proxy there is no network at all; through it, a denial comes at once and says why."""
    done = user.inside(
        "curl -sS -m 5 --noproxy '*' http://192.0.2.1/; curl -sS -m 5 http://denied.example.org/",
        cwd=workspace,
    )

    assert "Couldn't connect" in done.stderr
    denial = json.loads(done.stdout.splitlines()[0].split("}")[0] + "}")
    assert denial["reason"] == "not-in-allowlist"
    assert "denied.example.org:80" in denial["remedy"]
    user.close()


def test_a_detached_run_is_listed_logged_and_stopped(user: User, workspace: Path) -> None:
    """`--detach` prints the id, keeps the output, and ends when told."""
    started = user.run("run", "--detach", "shell", "--", "sh", "-c", "echo output; sleep 60", cwd=workspace)
    run = started.stdout.strip()
    done = user.run("exec", run, "--", "sh", "-c", "echo inside; exit 3", cwd=workspace)
    user.run("stop", run, cwd=workspace)

    assert started.returncode == 0
    assert started.stderr in {"", "cloister: starting the broker\n"}  # said where that takes long
    assert (done.stdout, done.returncode) == ("inside\n", 3)
    assert (user.state / f"runs/{run}/output.log").read_text() == "output\n"
    assert user.receipts()[-1]["reason"] in {"exited", "stopped"}
    user.close()


def test_a_stop_without_grace_is_at_once(user: User, workspace: Path) -> None:
    """`--grace 0` kills what takes no SIGTERM; a word that is no time is refused, and stops nothing."""
    script = "trap '' TERM; echo begun; while :; do sleep 1; done"
    run = user.run("run", "--detach", "shell", "--", "sh", "-c", script, cwd=workspace).stdout.strip()
    output = user.state / f"runs/{run}/output.log"
    until = time.monotonic() + 30
    while not (output.exists() and output.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    wrong = user.run("stop", run, "--grace", "-1s", cwd=workspace)
    listed = user.run("ps", "--quiet", cwd=workspace).stdout.split()
    began = time.monotonic()
    done = user.run("stop", run, "--grace", "0", cwd=workspace)
    took = time.monotonic() - began
    receipt = user.receipts()[-1]
    user.close()

    assert (wrong.returncode, listed) == (64, [run])
    assert done.returncode == 0, done.stderr
    assert took < 8
    assert (receipt["exit_code"], receipt["reason"]) == (137, "stopped")


def test_a_detached_run_whose_agent_never_ran_is_told_as_that(user: User, workspace: Path) -> None:
    """No id of a run that cannot be worked with: the caller gets the reason and the code, as without `--detach`."""
    script = workspace / "agent"
    for interpreter, code in (("/nowhere/to/be/found", 127), ("/tmp", 126)):
        script.write_text(f"#!{interpreter}\n")
        script.chmod(0o755)
        failed = user.run("run", "--detach", "shell", "--", "./agent", cwd=workspace)
        assert (failed.returncode, failed.stdout, "[exec-failed]" in failed.stderr) == (code, "", True)
    assert sorted(receipt["exit_code"] for receipt in user.receipts()) == [126, 127]
    quick = user.run("run", "--detach", "shell", "--", "true", cwd=workspace)
    assert (quick.returncode, len(quick.stdout.strip()), quick.stderr) == (0, 12, "")
    user.close()


def test_runtime_max_ends_the_run_with_124(user: User, workspace: Path) -> None:
    """A run over its time is ended, however it ignores signals; one within it is not."""
    user.write_policy(BASE + '[agents.shell.limits]\nruntime_max = "1s"\n')
    late = user.inside("trap '' TERM; while :; do sleep 0.1; done", cwd=workspace)
    early = user.inside("true", cwd=workspace)

    assert (late.returncode, early.returncode) == (124, 0)
    assert "timed-out" in late.stderr
    user.close()


def test_limits_hold(user: User, workspace: Path) -> None:
    """Memory, tasks and disk have ceilings, and what stays below them works."""
    if os.getuid() == 0:
        pytest.skip("root is exempt from RLIMIT_NPROC")
    user.write_policy(BASE + '[agents.shell.limits]\nmemory_max = "256M"\ntasks_max = 40\ndisk_max = "16M"\n')
    memory = user.run("run", "shell", "--", "/usr/bin/python3", "-c", "bytearray(600 << 20)", cwd=workspace)
    small = user.run("run", "shell", "--", "/usr/bin/python3", "-c", "bytearray(60 << 20)", cwd=workspace)
    tasks = user.inside("for i in $(seq 100); do sleep 5 & done", cwd=workspace)
    disk = user.inside("head -c 64M /dev/zero > /tmp/big", cwd=workspace)

    assert "MemoryError" in memory.stderr or "memory_max was reached" in memory.stderr  # rlimit, or cgroup
    assert memory.returncode in {1, 137}
    assert small.returncode == 0
    assert "fork" in tasks.stderr.lower()
    assert "No space left" in disk.stderr
    user.close()


def test_the_receipt_says_what_was_enforced(user: User, workspace: Path) -> None:
    """A receipt names policy, plan, host, the self-probe's results, and the denials."""
    user.inside("curl -s http://denied.example.org/ >/dev/null", cwd=workspace)
    receipt = user.receipts()[-1]

    assert receipt["exit_code"] == 0
    assert "verdict=passed" in receipt["probe"]
    assert "write:/usr=denied" in receipt["probe"]
    assert len(receipt["policy_digest"]) == len(receipt["plan_digest"]) == 64
    assert receipt["denied"] == ["denied.example.org:80 not-in-allowlist (1 times)"]
    assert receipt["denials"] == 1
    user.close()


def test_equal_starts_have_equal_plan_digests(user: User, workspace: Path) -> None:
    """The same policy, project and command give the same plan digest; another command does not."""
    for command in ("true", "true", "false"):
        user.run("run", "shell", "--", command, cwd=workspace)
    first, second, third = (receipt["plan_digest"] for receipt in user.receipts())
    plans = [path.read_text().replace(path.parent.name, "RUN") for path in sorted(user.state.glob("runs/*/plan.json"))]

    assert plans[0] == plans[1]
    assert first == second != third
    user.close()


def test_the_agent_starts_in_the_callers_directory(user: User, workspace: Path) -> None:
    """A subdirectory of a repository has the whole repository as its workspace, and is where the agent starts."""
    folder = workspace / "deep er"
    folder.mkdir()
    done = user.inside("pwd; cat ../README; git rev-parse --show-toplevel", cwd=folder)

    assert done.stdout.splitlines() == [str(folder), "a project", str(workspace)]
    user.close()


def test_git_commit_works_and_configuration_does_not_change(user: User, workspace: Path) -> None:
    """The agent can commit as its user; it cannot set what git would run on the host."""
    done = user.inside("echo x > f; git add -A; git commit -qm work && git log --format=%an -1", cwd=workspace)
    config = user.inside("git config core.fsmonitor evil; git config alias.x '!evil'; echo tried", cwd=workspace)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=workspace, capture_output=True, text=True, check=True)

    assert done.stdout == "Dev\n", done.stderr
    assert "tried" in config.stdout
    assert "evil" not in (workspace / ".git/config").read_text()
    assert status.stdout == ""
    user.close()


def test_a_protection_that_the_host_takes_away_ends_the_run(user: User, workspace: Path) -> None:
    """A person's own `git config` replaces the mounted file; before the agent can use that, the run is over."""
    script = "while :; do echo evil >> .git/config; sleep 0.05; done 2>/dev/null"
    run = user.start("run", "shell", "--", "sh", "-c", script, cwd=workspace)
    user.wait_running()
    subprocess.run(["git", "config", "user.name", "Me"], cwd=workspace, check=True)
    _, error = run.communicate(timeout=20)

    assert run.returncode == 125
    assert b"protection-lost" in error
    user.close()


def test_reading_on_the_host_ends_no_run(user: User, workspace: Path) -> None:
    """Looking at protected files, and committing, on the host does not disturb the agent."""
    run = user.start("run", "shell", "--", "sleep", "2", cwd=workspace)
    user.wait_running()
    for words in (["git", "status"], ["git", "config", "--list"], ["git", "stash", "list"], ["ls", "-la", ".git"]):
        subprocess.run(words, cwd=workspace, check=True, capture_output=True)

    assert run.wait(20) == 0
    user.close()


def test_overlay_mode_leaves_the_workspace_alone(user: User, workspace: Path) -> None:
    """In overlay mode the agent sees its changes, and the workspace does not."""
    user.write_policy(BASE + '[agents.shell.workspace]\nmode = "overlay"\n')
    done = user.inside("echo new > f; echo changed > README; cat README f; rm -rf .git", cwd=workspace)

    assert done.stdout == "changed\nnew\n", done.stderr
    assert (workspace / "README").read_text() == "a project\n"
    assert not (workspace / "f").exists()
    assert (workspace / ".git/HEAD").exists()
    user.close()


def test_two_runs_at_once_share_a_workspace(user: User, workspace: Path) -> None:
    """Two agents in one project do not take each other's protection away."""
    first = user.start(
        "run", "shell", "--", "sh", "-c", "sleep 3; mkdir .vscode 2>&1; echo x > .vscode/tasks.json", cwd=workspace
    )
    user.wait_running(1)
    second = user.inside("echo x > .vscode/tasks.json", cwd=workspace)
    out, err = first.communicate(timeout=30)

    assert second.returncode != 0
    assert first.returncode != 0, (out, err)
    assert not (workspace / ".vscode").exists()
    user.close()


def test_the_broker_ends_when_idle(user: User, workspace: Path) -> None:
    """A broker without runs goes away by itself, and the next run starts another one."""
    user.environment["CLOISTER_BROKER_IDLE_S"] = "0.3"
    assert user.inside("true", cwd=workspace).returncode == 0
    first = user.broker_pid
    descriptor = os.pidfd_open(first)
    from support.cloister import wait_for

    wait_for(descriptor)
    os.close(descriptor)
    assert user.inside("true", cwd=workspace).returncode == 0
    assert user.broker_pid != first
    user.close()
