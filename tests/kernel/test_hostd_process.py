"""Root's daemon as a process: what it imports, and that it believes no unit that is not what was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import msgspec
import pytest

from cloister.errors import StepError
from cloister.host import unit_start
from cloister.plan.unit import FIRST_UID, UnitLaunch

pytestmark = pytest.mark.kernel
ROOMS = {"cloister", "cloister.errors", "cloister.services"}
UNIT = UnitLaunch(
    unit="cloister-run-x.service",
    account="cl-pi-alice",
    uid=os.getuid(),
    mounts=(),
    properties=(("User", "cl-pi-alice"),),
)


def test_root_imports_host_plan_and_errors_only() -> None:
    """No code that reads policies, carries traffic or holds secrets is loaded into root's daemon."""
    code = "import json, sys, cloister.services.hostd; print(json.dumps(sorted(sys.modules)))"
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    loaded = set(json.loads(done.stdout))
    own = {name for name in loaded if name.split(".")[0] == "cloister"}
    others = {
        name for name in own - ROOMS
        if not name.startswith(("cloister.host", "cloister.plan", "cloister.services.hostd"))
    }  # fmt: skip
    assert others == set()
    heavy = {
        "asyncio",
        "ssl",
        "cryptography",
        "h2",
        "jwt",
        "apsw",
        "uvloop",
        "httptools",
        "prometheus_client",
        "sqlite3",
    }
    assert not heavy & loaded


def test_a_process_that_is_not_what_was_asked_for() -> None:
    """A first process that has no filter, or powers, or is somebody else's, is no unit of ours."""
    for uid in (os.getuid(), FIRST_UID):
        with pytest.raises(StepError, match="something else"):
            unit_start.check_process(os.getpid(), msgspec.structs.replace(UNIT, uid=uid), "/x/cloister-run-x.service")


def test_a_process_that_is_gone() -> None:
    """A first process that has ended meanwhile is a deviation, not a crash."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(StepError, match="gone"):
        unit_start.check_process(gone.pid, UNIT, "/x/cloister-run-x.service")
