"""SIGKILL to every process of ours at every stage: the run ends, and the next start cleans what is left.

Stages: right after the request, while the sandbox is set up, while the agent runs, while it
ends. Processes: the outer shim (what the user started), bubblewrap, the inner shim, the broker.
"""

import os
import secrets
import signal
import time
from pathlib import Path

import pytest

from support.cloister import User, descendants

pytestmark = pytest.mark.kernel
NAP = f"{300 + secrets.randbelow(10**6) / 10**6:.6f}"
"""A duration that no other process on this machine sleeps for."""
AGENT = ("sh", "-c", f"touch started; setsid sleep {NAP} & sleep {NAP}")


def _pids(user: User, role: str, client: int) -> list[int]:
    """Return the processes of one role, for this user's runs."""
    runtime = str(user.runtime).encode()
    match role:
        case "outer":
            return [client]
        case "bwrap":
            return descendants([b"bwrap\0", runtime])
        case "inner":
            return [
                pid
                for pid in descendants([b"/run/cloister/shim\0inner", str(user.home).encode()])
                if pid not in descendants([b"bwrap\0"])
            ]
        case _:
            return [user.broker_pid]


def _kill(pids: list[int]) -> None:
    for pid in pids:
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def _assert_clean(user: User, workspace: Path) -> None:
    """After the next start nothing of the killed run is there."""
    assert user.inside("true", cwd=workspace).returncode == 0
    assert sorted(path.name for path in workspace.iterdir()) in (
        [".git", "README"],
        [".git", "README", "started"],
    )
    assert list((user.runtime / "cloister/runs").iterdir()) == []
    assert all(record["status"] == "finished" for record in user.records())
    assert len(user.receipts()) == len(user.records())


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("role", ["outer", "bwrap", "inner", "broker"])
def test_killed_while_the_agent_runs(user: User, workspace: Path, role: str) -> None:
    """Whoever is killed, the agent and its daemons end, and the caller hears of it."""
    client = user.start("run", "shell", "--", *AGENT, cwd=workspace)
    user.wait_running()
    _kill(_pids(user, role, client.pid))
    code = client.wait(20)

    assert code == {"outer": -signal.SIGKILL}.get(role, code)
    assert code != 0
    _assert_clean(user, workspace)
    assert not descendants([b"sleep\0" + NAP.encode()])
    user.close()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("role", ["outer", "bwrap", "inner", "broker"])
@pytest.mark.parametrize("delay_ms", [0, 5, 10, 20, 40, 80])
def test_killed_while_starting(user: User, workspace: Path, role: str, delay_ms: int) -> None:
    """The same at any moment of a start: no half-made sandbox survives."""
    assert user.inside("true", cwd=workspace).returncode == 0  # the broker is up, so that the delay means the start
    client = user.start("run", "shell", "--", *AGENT, cwd=workspace)
    time.sleep(delay_ms / 1000)
    _kill(_pids(user, role, client.pid))
    client.terminate()
    client.wait(20)

    _assert_clean(user, workspace)
    assert not descendants([b"sleep\0" + NAP.encode()])
    user.close()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("delay_ms", [0, 3, 10, 30])
def test_broker_killed_while_ending(user: User, workspace: Path, delay_ms: int) -> None:
    """A broker killed in the middle of undoing leaves a plan from which the next one finishes the job."""
    client = user.start("run", "shell", "--", "sleep", "0.3", cwd=workspace)
    user.wait_running()
    time.sleep(0.3 + delay_ms / 1000)
    _kill([user.broker_pid])
    client.wait(20)

    _assert_clean(user, workspace)
    user.close()


@pytest.mark.usefixtures("nothing_left")
def test_everything_killed_at_once(user: User, workspace: Path) -> None:
    """Even when nobody is left to clean up, the next start does."""
    client = user.start("run", "shell", "--", *AGENT, cwd=workspace)
    user.wait_running()
    _kill([*_pids(user, "broker", 0), *_pids(user, "outer", client.pid), *_pids(user, "bwrap", 0)])
    client.wait(20)

    _assert_clean(user, workspace)
    user.close()


@pytest.mark.usefixtures("nothing_left")
def test_a_signal_to_the_caller_reaches_the_agent(user: User, workspace: Path) -> None:
    """SIGTERM is passed on: an agent that handles it ends in its own way, and its code is the caller's."""
    client = user.start(
        "run",
        "shell",
        "--",
        "sh",
        "-c",
        "trap 'echo bye > bye; exit 9' TERM; while :; do sleep 0.05; done",
        cwd=workspace,
    )
    user.wait_running()
    time.sleep(0.2)
    client.terminate()

    assert client.wait(20) == 9
    assert (workspace / "bye").read_text() == "bye\n"
    user.close()


@pytest.mark.usefixtures("nothing_left")
def test_stopping_the_broker_ends_its_runs(user: User, workspace: Path) -> None:
    """SIGTERM to the broker ends the runs bound to it, in order, with receipts."""
    client = user.start("run", "shell", "--", *AGENT, cwd=workspace)
    user.wait_running()
    os.kill(user.broker_pid, signal.SIGTERM)
    client.wait(20)

    _assert_clean(user, workspace)
    user.close()
