"""Verbs about runs against real ones: ps, logs, inspect, receipt, stop, why, learn, policy reload."""

import json
import os
import pty
import re
import subprocess
import time
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e"
ASK_PROXY = (
    "import socket\nfor host in ('one.example.net', 'one.example.net', 'two.example.net'):\n"
    " s = socket.create_connection(('127.0.0.1', 3128))\n"
    " s.sendall(f'CONNECT {host}:443 HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n'.encode())\n print(s.recv(99)[9:12])"
)


def _detached(user: User, workspace: Path, *words: str) -> str:
    """Start a detached run; return its id."""
    known = {record["id"] for record in user.records()}
    done = user.run("run", "--detach", "shell", "--", *words, cwd=workspace)
    assert done.returncode == 0, done.stderr
    return next(record["id"] for record in user.records() if record["id"] not in known)


def _finish(user: User, run: str, timeout_s: float = 20) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        record = next(record for record in user.records() if record["id"] == run)
        if record["status"] == "finished":
            return record
        time.sleep(0.05)
    raise AssertionError("the run does not end")


def test_the_life_of_a_detached_run(user: User, workspace: Path) -> None:
    """Ps lists it while it lives; logs -f follows to its end; afterwards --all has it, with its exit code."""
    run = _detached(user, workspace, "sh", "-c", "echo begin; sleep 1; echo end; exit 3")
    user.wait_running()
    living = json.loads(user.run("ps", "--json", cwd=workspace).stdout)
    followed = user.run("logs", "-f", run[:8], cwd=workspace)
    after = json.loads(user.run("ps", "--all", "--json", cwd=workspace).stdout)

    assert [(row["id"], row["status"], row["detached"]) for row in living] == [(run, "running", True)]
    assert followed.stdout == "begin\nend\n"
    assert json.loads(user.run("ps", "--json", cwd=workspace).stdout) == []
    assert [(row["status"], row["exit_code"], row["reason"]) for row in after] == [("finished", 3, "exited")]
    assert "3" in user.run("ps", "-a", cwd=workspace).stdout
    user.close()


def test_stop_waits_and_is_repeatable(user: User, workspace: Path) -> None:
    """When stop returns the run is over; a run that ignores SIGTERM is killed; stopping again is no mistake."""
    run = _detached(user, workspace, "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    user.wait_running()
    stopped = user.run("stop", "--grace", "1s", run, cwd=workspace)
    again = user.run("stop", "last", "--json", cwd=workspace)

    assert stopped.returncode == 0
    assert "is over: stopped, exit code 137" in stopped.stdout
    assert user.records()[0]["status"] == "finished"
    assert json.loads(again.stdout) == [{"run": run, "exit_code": 137, "reason": "stopped"}]
    user.close()


def test_stop_all_ends_every_run_and_only_when_asked(user: User, workspace: Path) -> None:
    """Without a run and without --all nothing is ended; with --all everything is."""
    for _ in range(2):
        _detached(user, workspace, "sleep", "60")
    user.wait_running(2)
    bare = user.run("stop", cwd=workspace)
    assert bare.returncode == 64
    assert len(json.loads(user.run("ps", "--json", cwd=workspace).stdout)) == 2
    everything = user.run("stop", "--all", cwd=workspace)

    assert everything.returncode == 0
    assert [record["status"] for record in user.records()] == ["finished", "finished"]
    user.close()


def _on_a_terminal(user: User, workspace: Path, *words: str) -> str:
    """Run a verb with a terminal as its output; return what the terminal got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(user.command(*words), cwd=workspace, env=user.environment, stdin=theirs, stdout=theirs)
    os.close(theirs)
    data = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        data += part
    os.close(ours)
    assert process.wait(timeout=30) == 0
    return data.decode("utf-8", "replace")


@pytest.mark.parametrize(
    "verb", [("ps", "-a"), ("receipt",), ("inspect",), ("inspect", "--argv"), ("inspect", "--plan"), ("logs",)]
)
def test_nothing_of_an_agent_steers_the_terminal(user: User, workspace: Path, verb: tuple[str, ...]) -> None:
    """Escape sequences in a command line or in output reach no terminal; what they stood in is still readable."""
    _finish(user, _detached(user, workspace, "sh", "-c", 'printf "%s\\n" "$1"; true marker', "x", f"before{EVIL}after"))
    words = verb if verb[0] == "ps" else (*verb, "last")
    shown = _on_a_terminal(user, workspace, *words)
    user.close()

    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown)
    assert "before" in shown or verb in {("ps", "-a"), ("inspect", "--argv")}


def test_raw_output_is_exact_but_not_for_terminals(user: User, workspace: Path) -> None:
    """--raw gives every byte into a pipe, and refuses a terminal; without it the same output is cleaned."""
    _finish(user, _detached(user, workspace, "printf", "\\033[31mred\\033[0m\\n"))
    raw, plain = user.run("logs", "--raw", "last", cwd=workspace), user.run("logs", "last", cwd=workspace)

    assert raw.stdout == "\x1b[31mred\x1b[0m\n"
    assert plain.stdout == "red\n"
    with pytest.raises(AssertionError):
        _on_a_terminal(user, workspace, "logs", "--raw", "last")
    user.close()


def test_denials_are_told_by_every_verb(user: User, workspace: Path) -> None:
    """Ps counts them, logs lists them, why groups them with the line that allows each, the receipt has them."""
    done = user.run("run", "shell", "--", "python3", "-c", ASK_PROXY, cwd=workspace)
    assert done.stdout == "b'403'\n" * 3
    row = json.loads(user.run("ps", "-a", "--json", cwd=workspace).stdout)[0]
    why = json.loads(user.run("why", "last", "--json", cwd=workspace).stdout)
    logs = user.run("logs", "last", cwd=workspace).stdout
    events = [json.loads(line) for line in user.run("logs", "last", "--json", cwd=workspace).stdout.splitlines()]

    assert row["denials"] == 3
    assert [(one["host"], one["times"], one["line"]) for one in why["denials"]] == [
        ("one.example.net", 2, '"one.example.net"'),
        ("two.example.net", 1, '"two.example.net"'),
    ]
    assert logs.count("DENIED") == 3
    assert [event["host"] for event in events] == ["one.example.net", "one.example.net", "two.example.net"]
    assert "two.example.net" in user.run("receipt", "last", cwd=workspace).stdout
    assert "one.example.net:443  2" in user.run("inspect", "last", "--egress", cwd=workspace).stdout.replace(
        "      ", "  "
    )
    user.close()


def test_learning_changes_the_policy_and_nothing_else(user: User, workspace: Path) -> None:
    """Learn shows a difference and writes nothing; --write adds the lines and keeps comments and a backup."""
    policy = user.home / ".config/cloister/cloister.toml"
    text = f'{BASE}\n[agents.shell.egress] # mine\nallow = [\n    "kept.example.net", # why\n]\n'
    user.write_policy(text)
    user.run("run", "shell", "--", "python3", "-c", ASK_PROXY, cwd=workspace)
    shown = user.run("learn", "last", cwd=workspace)
    assert '+    "one.example.net",' in shown.stdout
    assert policy.read_text() == text
    written = json.loads(user.run("learn", "last", "--write", "--json", cwd=workspace).stdout)

    assert written["entries"] == ["one.example.net", "two.example.net"]
    assert Path(written["backup"]).read_text() == text
    assert policy.read_text() == text.replace("# why\n", '# why\n    "one.example.net",\n    "two.example.net",\n')
    assert policy.stat().st_mode & 0o777 == 0o600
    assert user.run("explain", "shell", "two.example.net", cwd=workspace).returncode == 0
    assert "wanted nothing" in user.run("learn", "last", cwd=workspace).stdout
    user.close()


def test_reload_reaches_a_living_run(user: User, workspace: Path) -> None:
    """After policy reload the same request of the same run is no longer refused; a broken policy changes nothing."""
    script = ASK_PROXY.replace(
        "for host in ('one.example.net', 'one.example.net', 'two.example.net')",
        "import time\nfor host in 300 * ('[::1]',)",
    )
    script = script.replace(" print(", " time.sleep(0.1)\n print(").replace("{host}:443", "{host}:1")
    run = _detached(user, workspace, "python3", "-u", "-c", script)
    user.wait_running()
    good = f'{BASE}\n[agents.shell.egress]\nallow = ["[::1]:1"]\nprivate = ["::1/128"]\n'
    user.write_policy("schema = 1\nbroken")
    broken = user.run("policy", "reload", cwd=workspace)
    assert broken.returncode == 78
    user.write_policy(good.replace('private = ["::1/128"]\n', ""))
    reloaded = json.loads(user.run("policy", "reload", "--json", cwd=workspace).stdout)
    assert [one["run"] for one in reloaded["reloaded"]] == [run]
    time.sleep(0.5)
    reasons = [one["reason"] for one in json.loads(user.run("why", run, "--json", cwd=workspace).stdout)["denials"]]
    user.run("stop", run, "--grace", "1s", cwd=workspace)

    assert reasons == ["not-in-allowlist", "address-refused"]
    assert "policy-reloaded" in user.run("logs", run, "--events", cwd=workspace).stdout
    user.close()


@pytest.mark.parametrize("verb", ["logs", "inspect", "receipt", "stop", "why", "learn"])
def test_unknown_runs_are_one_clear_error(user: User, workspace: Path, verb: str) -> None:
    """No run, an ambiguous beginning and a path all give run-unknown and 64; with --json programs get it too."""
    for _ in range(2):
        assert user.inside("true", cwd=workspace).returncode == 0
    for word in ("zzzz", "n", "../runs", "", "last/..", "\x1b[2J"):
        done = user.run(verb, word, *(() if verb == "logs" else ("--json",)), cwd=workspace)
        assert done.returncode == 64, word
        assert "run-unknown" in done.stderr
        assert "\x1b" not in done.stderr
        assert verb == "logs" or json.loads(done.stdout)["error"]["reference"] == "run-unknown"
    user.close()


def test_a_reader_that_leaves_is_no_error(user: User, workspace: Path) -> None:
    """`cloister VERB | head -1` says nothing on standard error, whether the output is short or long."""
    for words in (("plan", "shell"), ("ps", "-a"), ("policy", "schema")):
        command = " ".join(user.command(*words)) + " | true"
        done = subprocess.run(
            ["bash", "-c", f"sleep 0; {command}"], cwd=workspace, env=user.environment, capture_output=True, check=False
        )
        assert done.stderr == b""


def test_a_run_that_goes_on_has_no_receipt_but_can_be_inspected(user: User, workspace: Path) -> None:
    """Receipt of a living run is an error that says so; inspect shows its state and digests; then both agree."""
    run = _detached(user, workspace, "sleep", "60")
    user.wait_running()
    early = user.run("receipt", run, cwd=workspace)
    shown = json.loads(user.run("inspect", run, "--json", cwd=workspace).stdout)
    page = user.run("inspect", run, cwd=workspace).stdout
    user.run("stop", run, "--grace", "1s", cwd=workspace)
    receipt = json.loads(user.run("receipt", run, "--json", cwd=workspace).stdout)

    assert (early.returncode, "run-not-over" in early.stderr) == (64, True)
    assert (shown["run"]["status"], shown["receipt"]) == ("running", None)
    assert "running, detached" in page
    assert shown["plan_digest"] == receipt["plan_digest"]
    assert receipt["policy_digest"] in page
    user.close()


def test_the_plan_that_is_shown_is_the_plan_that_is_run(user: User, workspace: Path) -> None:
    """`cloister plan` in its own process and the broker compile the same plan, to the byte, but for the run's id."""
    words = ("shell", "--", "/bin/echo", "same")
    planned = user.run("plan", "--json", *words, cwd=workspace).stdout
    assert user.run("run", *words, cwd=workspace).stdout == "same\n"
    ran = user.run("inspect", "last", "--plan", "--json", cwd=workspace).stdout
    user.close()

    first, second = json.loads(planned)["run"], json.loads(ran)["run"]
    assert first != second
    assert planned.replace(first, second).strip() == ran.strip()
