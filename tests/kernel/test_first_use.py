"""Two threads that use a type for the first time: msgspec ends the process there, and what has threads prevents it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.cloister import User

pytestmark = pytest.mark.kernel
RACE = """
import sys, threading
import cloister.services.broker
from cloister.audit import detect_rules
from cloister.policy.document import read
from cloister.policy.first_use import look_at_types
from cloister.policy.presets import builtin_presets

def presets():
    read(b'schema = 1\\n[agents.shell]\\npreset = "shell"\\n', "cloister.toml")
    assert builtin_presets()

if sys.argv[1] == "looked":
    look_at_types()
sys.setswitchinterval(1e-6)  # what a busy machine does now and then, all the time
threads = [threading.Thread(target=each) for each in (presets, detect_rules.shipped) * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("well")
"""


def ends(how: str, times: int) -> list[tuple[int, str]]:
    """Return how processes ended in which threads read a policy and the rules of the audit log at once."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = (
        subprocess.run(
            [sys.executable, "-c", RACE, how], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        for _ in range(times)
    )
    return [(one.returncode, one.stdout) for one in done]


def test_threads_that_read_at_once_end_no_process() -> None:
    """Ten times in a row; and the search finds what it is for: without a look at the types a process dies of it."""
    assert ends("looked", 10) == [(0, "well\n")] * 10
    tried = 0
    while (-signal.SIGSEGV, "") not in ends("not", 5):
        tried += 1
        if tried == 20:  # it takes three of four here: msgspec may have mended it
            pytest.fail("msgspec looks at types in threads now: policy/first_use.py is not needed any more")


@pytest.mark.usefixtures("nothing_left")
def test_a_start_after_a_killed_broker_is_a_start(user: User, workspace: Path) -> None:
    """Its audit log writes of the former run while it reads the policy for the next: eight times in a row it lives."""
    for _ in range(8):
        client = user.start("run", "shell", "--", "sleep", "60", cwd=workspace)
        user.wait_running()
        os.kill(user.broker_pid, signal.SIGKILL)
        client.wait(20)
        done = user.inside("true", cwd=workspace)
        assert done.returncode == 0, done.stderr
    user.close()
