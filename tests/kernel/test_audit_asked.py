"""Real runs, asked about: what they did is found, shown in order, detected, and ended where a rule says so."""

import json
from pathlib import Path

import pytest

from cloister.runs.audit_verify import verify
from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
RULES = """
[audit]
detections = { first-seen-host = "off" }
[[audit.rules]]
name = "no-production"
title = "production was asked for"
severity = "critical"
kinds = ["egress"]
hosts = ["*.prod.example.org"]
action = "stop"
"""


def asked(user: User, *words: str, cwd: Path) -> list[dict]:
    """Return the events that `cloister audit query` finds."""
    done = user.run("audit", "query", "--own", "--json", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_detection_stops_the_run_and_everything_is_found(user: User, workspace: Path) -> None:
    """A host that a rule is about ends the run with 125 and the rule's name; another host of the same run did not."""
    user.write_policy(f"{BASE}\n{RULES}")
    fine = user.inside("curl -s https://docs.example.org; true", cwd=workspace)
    ended = user.inside("curl -s https://db.prod.example.org; sleep 30; echo still here", cwd=workspace)

    assert fine.returncode == 0
    assert ended.returncode == 125
    assert "still here" not in ended.stdout
    assert "no-production" in ended.stderr
    reasons = [receipt["reason"] for receipt in user.receipts()]
    assert sorted(reasons) == ["detection-matched", "exited"]
    (match,) = asked(user, "--kind", "detection", cwd=workspace)
    assert (match["rule"], match["severity_id"]) == ("no-production", 5)
    (event,) = asked(user, "--host", "db.prod.example.org", "--kind", "egress", cwd=workspace)
    assert match["details"]["events"] == str(event["seq"])
    assert {one["run"] for one in asked(user, "--run", match["run"], cwd=workspace)} == {match["run"]}
    count = user.run("audit", "query", "--own", "--kind", "run.started", "--count", cwd=workspace)
    assert count.stdout.strip() == "2"
    user.close()
    assert verify(f"{user.state}/audit").good


def test_the_timeline_of_a_real_run(user: User, workspace: Path) -> None:
    """From the log, and from the run's own records when no log has it: start, refusal and end, in order; and a page."""
    user.inside("curl -s https://denied.example.org; true", cwd=workspace)
    user.close()
    run = user.receipts()[0]["id"]
    target = workspace / "run.html"
    by_log = user.run("timeline", "last", cwd=workspace)
    by_records = user.run("timeline", "last", "--records", cwd=workspace)
    page = user.run("timeline", run, "--html", str(target), cwd=workspace)

    for done in (by_log, by_records):
        assert done.returncode == 0, done.stderr
        kinds = [line.split()[1] for line in done.stdout.splitlines() if line.lstrip().startswith("+")]
        assert kinds.index("run.started") < kinds.index("egress.decided") < kinds.index("run.ended")
        assert "denied.example.org" in done.stdout
    assert "the run's own records" in by_records.stdout
    assert "the run's own records" not in by_log.stdout
    assert page.returncode == 0
    assert "denied.example.org" in target.read_text()
    assert target.stat().st_mode & 0o077 == 0
