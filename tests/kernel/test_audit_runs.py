"""Runs of a user on record: the broker keeps that user's own log, and obeys the policy when it cannot."""

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from cloister.runs.audit_verify import verify
from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def events(user: User) -> list[dict]:
    """Return what is in the log."""
    found = sorted((user.state / "audit").glob("*.jsonl"))
    return [json.loads(line) for path in found for line in path.read_text().splitlines()]


def test_a_run_is_on_record_and_the_log_verifies(user: User, workspace: Path) -> None:
    """Start, steps, a denied connection and the end of a run stand in the log, in order, with both digests."""
    done = user.inside("curl -s https://denied.example.org; true", cwd=workspace)
    refused = user.run("run", "nobody", cwd=workspace)
    user.close()
    said = events(user)
    run = user.receipts()[0]

    assert (done.returncode, refused.returncode) == (0, 125)
    kinds = [event["kind"] for event in said]
    assert kinds[0] == "log.opened"
    assert kinds[-2:] == ["log.closed", "log.head"]
    assert kinds.index("run.started") < kinds.index("step.applied") < kinds.index("egress.decided")
    assert kinds.index("egress.decided") < kinds.index("step.undone") < kinds.index("run.ended")
    (started,) = [event for event in said if event["kind"] == "run.started"]
    assert (started["run"], started["plan"]) == (run["id"], run["plan_digest"])
    assert started["policy"] == run["policy_digest"]
    assert started["details"]["workspace"] == str(workspace)
    assert "curl" in started["message"]
    (denied,) = [event for event in said if event["kind"] == "egress.decided"]
    assert (denied["disposition"], denied["endpoint"]["hostname"]) == ("blocked", "denied.example.org")
    (not_started,) = [event for event in said if event["kind"] == "run.refused"]
    assert not_started["agent"] == "nobody"
    report = verify(str(user.state / "audit"))
    assert report.good, report.findings
    assert (report.ending, report.signed_to) == ("closed", len(said))


def test_the_agent_reaches_neither_log_nor_key(user: User, workspace: Path) -> None:
    """Log, key and lock are not there for the agent; the same command outside finds them."""
    look = f"ls {user.state}/audit {user.state}/audit-key 2>&1; cat {user.state}/audit/* | wc -c; ls /run/cloister"
    user.inside("true", cwd=workspace)
    done = user.inside(look, cwd=workspace)
    user.close()

    assert "jsonl" not in done.stdout
    assert "signing.pem" not in done.stdout
    assert done.stdout.splitlines()[-1:] == ["0"] or "\n0\n" in done.stdout
    assert (user.state / "audit-key/signing.pem").stat().st_mode & 0o777 == 0o600
    assert (user.state / "audit").stat().st_mode & 0o777 == 0o700


def unrecorded(user: User, workspace: Path) -> bool:
    """Return whether `cloister ps` says that the one run that lives is not recorded at present."""
    user.wait_running()
    return "running, unrecorded" in user.run("ps", cwd=workspace).stdout


@pytest.mark.parametrize("on_failure", ["stop", "alarm"])
def test_a_log_that_cannot_be_written_stops_runs_or_is_told(user: User, workspace: Path, on_failure: str) -> None:
    """`stop` ends the living run with 125 and refuses the next; with `alarm` it goes on, and ps and receipt say so."""
    user.write_policy(f'{BASE}\n[audit]\non_failure = "{on_failure}"\n')
    (user.state / "audit").mkdir(mode=0o700, parents=True)
    held = os.open(user.state / "audit/lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)  # another keeper has the log
    living = user.start("run", "shell", "--", "sh", "-c", "sleep 13; echo done", cwd=workspace)
    seen = [unrecorded(user, workspace)]
    if on_failure == "alarm":
        time.sleep(11)
        seen.append(unrecorded(user, workspace))
    out, _ = living.communicate(timeout=40)
    if on_failure == "stop":
        again = user.run("run", "shell", "--", "true", cwd=workspace)
        assert (living.returncode, out) == (125, b"")
        assert "[audit-lost]" in again.stderr
        assert again.returncode == 125
        os.close(held)
    else:
        assert (living.returncode, out) == (0, b"done\n")
        assert seen == [False, True]
    assert user.receipts()[0]["reason"] == ("audit-lost" if on_failure == "stop" else "exited")
    if on_failure == "alarm":
        assert any("[audit-lost]" in warning for warning in user.receipts()[0]["warnings"])
        os.close(held)
    user.close()
