"""A reader that is killed while it builds the index, again and again: the next one goes on, and answers right."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloister.audit.question import Question
from cloister.runs.audit_log import AuditLog
from support.audit_log import Writer, busy_day

pytestmark = pytest.mark.kernel
BUILD = """
import sys
from cloister.host import audit_postings
audit_postings.CHUNK = 2000
from cloister.runs.audit_log import AuditLog
log = AuditLog(sys.argv[1], sys.argv[2])
print("begun", flush=True)
log.refresh()
"""


def test_killed_while_indexing(tmp_path: Path) -> None:
    """After kills at any time, and two readers at once, every event is found once."""
    Writer(tmp_path / "log", per_segment=7000).write_fields(busy_day(40_000))
    words = [sys.executable, "-c", BUILD, str(tmp_path / "log"), str(tmp_path / "i" / "i.db")]
    dice = random.Random(11)  # noqa: S311  # the same times each time
    for _ in range(8):
        two = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
        assert two[0].stdout
        two[0].stdout.readline()
        time.sleep(dice.random() * 0.25)
        for process in two:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout
            process.stdout.close()
    log = AuditLog(str(tmp_path / "log"), str(tmp_path / "i" / "i.db"))
    log.refresh()

    assert [event.seq for event in log.find(Question())] == list(range(1, 40_001))
    assert sum(log.count(Question(), "agent").values()) == 40_000
    log.close()
