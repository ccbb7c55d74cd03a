"""`llm.record` through the whole program: a real sandbox, its broker, and the person who reads the record later."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_runs import REAL_KEY, messages, set_up

from support.cloister import User, wait_for
from support.fake_model import FakeModel

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

SEALED = "model-calls.sealed"


def sealed(user: User) -> list[Path]:
    """Return the recordings of all runs."""
    return sorted(user.state.glob(f"runs/*/{SEALED}"))


def test_a_recorded_run_can_be_read_by_its_owner(user: User, workspace: Path) -> None:
    """Both calls are listed and printed whole, also after the master key was changed; receipt and opt-outs say so."""
    with FakeModel() as model:
        set_up(user, model, "record = true\n")
        done = user.inside(
            f"{messages()}; {messages('true')}; ls -la ~/.local/state 2>&1; cat /proc/mounts", cwd=workspace
        )
        assert done.stdout.count("FAKE-OK") == 2, done.stdout + done.stderr
        assert SEALED not in done.stdout
        user.close()

        (path,) = sealed(user)
        assert path.stat().st_mode & 0o777 == 0o600
        data = path.read_bytes()
        assert REAL_KEY.encode() not in data
        assert b"claude" not in data
        listed = user.run("llm", "recordings", "last", cwd=workspace)
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout.count("claude-sonnet-4-5") == 2
        assert user.run("identity", "rotate-master", cwd=workspace).returncode == 0
        shown = json.loads(user.run("llm", "recordings", "last", "2", "--json", cwd=workspace).stdout)
        request, answer = (body["text"] for body in shown["bodies"])
        assert json.loads(request) == model.requests[1].body
        assert "message_stop" in answer
        assert shown["whole"] is True
        assert REAL_KEY not in json.dumps(shown)
        assert "FAKE-OK" in user.run("llm", "recordings", "last", "1", cwd=workspace).stdout
        (receipt,) = user.receipts()
        assert any(text.startswith("llm.record:") for text in receipt["opt_outs"])
        assert "2 model calls were recorded [recorded]" in receipt["warnings"]


def test_a_changed_recording_is_refused(user: User, workspace: Path) -> None:
    """What opens before the change is shown, then the error; without its key nothing is shown at all."""
    with FakeModel() as model:
        set_up(user, model, "record = true\n")
        user.inside(f"{messages()}; {messages()}", cwd=workspace)
        user.close()
    (path,) = sealed(user)
    data = bytearray(path.read_bytes())
    data[-60] ^= 1
    path.write_bytes(data)
    damaged = user.run("llm", "recordings", "last", cwd=workspace)
    assert "claude-sonnet-4-5" in damaged.stdout
    assert "recording-damaged" in damaged.stderr
    assert damaged.returncode not in {0, 125}
    (user.state / "identity").rename(user.state / "elsewhere")
    lost = user.run("llm", "recordings", "last", cwd=workspace)
    assert lost.returncode != 0
    assert "claude" not in lost.stdout


def test_without_record_nothing_is_kept(user: User, workspace: Path) -> None:
    """The negative twin: no file, no key store, and the verb says that there is none."""
    with FakeModel() as model:
        set_up(user, model)
        assert "FAKE-OK" in user.inside(messages(), cwd=workspace).stdout
        user.close()
    assert sealed(user) == []
    assert not (user.state / "identity").exists()
    none = user.run("llm", "recordings", "last", cwd=workspace)
    assert none.returncode == 64
    assert "recording-none" in none.stderr


def test_a_killed_broker_leaves_what_was_written(user: User, workspace: Path) -> None:
    """The call opens, the missing end is said, and `gc` removes the record with its run."""
    with FakeModel() as model:
        set_up(user, model, "record = true\n")
        with user.start("run", "shell", "--", "/bin/sh", "-c", f"{messages()}; sleep 30", cwd=workspace) as run:
            deadline = time.monotonic() + 20
            while not model.requests and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            descriptor = os.pidfd_open(user.broker_pid)
            os.kill(user.broker_pid, signal.SIGKILL)
            wait_for(descriptor)
            os.close(descriptor)
            run.communicate(timeout=20)
    user.run("doctor", cwd=workspace)
    shown = user.run("llm", "recordings", "last", cwd=workspace)
    assert "claude-sonnet-4-5" in shown.stdout, shown.stderr
    assert "has no end" in shown.stdout
    user.inside("true", cwd=workspace)
    user.close()
    time.sleep(1.1)
    assert user.run("gc", "--older-than", "1s", cwd=workspace).returncode == 0
    assert sealed(user) == []


def test_a_record_that_cannot_be_kept_ends_the_calls(user: User, workspace: Path) -> None:
    """A master key that is missing starts nothing: nobody believes in a record that is not there."""
    with FakeModel() as model:
        set_up(user, model, "record = true\n")
        user.environment["CLOISTER_MASTER_KEY_PATH"] = str(user.home / "nowhere")
        done = user.inside(messages(), cwd=workspace)
        assert done.returncode == 125
        assert "master-key" in done.stderr
        assert model.requests == []
        user.close()


def test_a_reload_begins_and_ends_a_record(user: User, workspace: Path) -> None:
    """`record` that is switched on for a living run counts from the next call on, and off likewise."""
    go = "while [ ! -e go{0} ]; do sleep 0.05; done; "
    with FakeModel() as model:
        set_up(user, model)
        script = f"{messages()}; touch a; {go.format(1)}{messages()}; touch b; {go.format(2)}{messages()}"
        with user.start("run", "shell", "--", "/bin/sh", "-c", script, cwd=workspace) as run:
            for number, limits in enumerate(("record = true\n", ""), 1):
                wait_file(workspace / "ab"[number - 1])
                set_up(user, model, limits)
                assert user.run("policy", "reload", cwd=workspace).returncode == 0
                (workspace / f"go{number}").touch()
            run.communicate(timeout=30)
        assert len(model.requests) == 3
        user.close()
    listed = json.loads(user.run("llm", "recordings", "last", "--json", cwd=workspace).stdout)
    assert len(listed["calls"]) == 1
    assert listed["closed"] is True


def wait_file(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
