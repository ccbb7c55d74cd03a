"""The battery against an agent that has credentials, a login, models, identity and keys, with real servers behind."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from armed import Armed, armed

from cloister.prove.case import load
from support import leftovers
from support.cloister import User
from support.homes import make_home, make_workspace

pytestmark = pytest.mark.kernel

CASES = {name: case for name, case in load().items() if case.if_policy and not {"unit", "microvm"} & {*case.if_policy}}
ALSO = ("fs-cloister-files", "fs-home-canary", "fs-secret-stores", "ipc-gpg-agent", "ipc-key-agent",
        "ipc-known-sockets", "ipc-listed-sockets", "proc-environment", "proxy-answers", "proxy-private")  # fmt: skip
"""Cases for every policy, whose answer could be another one here."""


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Armed]:
    """The agent, and everything it talks to."""
    folder = tmp_path_factory.mktemp("armed")
    home = make_home(folder / "home")
    make_workspace(home / "src" / "project")
    with armed(User(home), folder / "servers") as made:
        yield made


@pytest.fixture(scope="module")
def results(agent: Armed) -> dict[str, dict[str, Any]]:
    """Try all these cases in one battery."""
    before = leftovers.take()
    found = agent.cases(*(word for name in (*CASES, *ALSO) for word in ("--case", name)))
    leftovers.check(before)
    return found


@pytest.mark.parametrize("case", sorted({*CASES, *ALSO}))
def test_attack_on_a_secret_is_denied(case: str, results: dict[str, dict[str, Any]]) -> None:
    """The attack was really tried, it fails, and its legitimate neighbour works."""
    result = results[case]

    assert result["outcome"] == "denied", result["detail"]
    assert result["twin"] in ("ok", "none")
    assert "no ssh-agent" not in result["detail"]
    assert "no gpg-agent" not in result["detail"]
    assert case != "ipc-key-agent" or "sign any bytes" in result["detail"]


@pytest.mark.usefixtures("results")
def test_the_servers_saw_what_the_twins_sent_and_no_placeholder(agent: Armed) -> None:
    """The twins reached the bound hosts; no provider was asked, and the login is as it was.

    Of a request with a placeholder in its body the head may leave before that is seen; the body does not.
    """
    sent = [request for server in agent.servers for request in server.sent]

    assert "HEAD" in {request.method for request in sent} <= {"HEAD", "POST"}
    assert not [request for request in sent if request.body]
    assert not [request for request in sent if "cloister-" in repr(request)]
    assert agent.model.requests == []
    assert [path for path, _ in agent.oauth.requests if path == "/token"] == []
    assert (agent.user.state / "logins/work.json").is_file()


def test_nobody_looks_into_the_process_that_knows_the_secrets(agent: Armed) -> None:
    """From when it has read them, the memory of `cloister prove` belongs to root (proc(5)); before, to its user."""
    directory = agent.user.home / "src/project"
    process = agent.user.start("prove", "shell", "--case", "cred-placeholders", "--case", "cred-inside", cwd=directory)
    owners = []
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            owners.append(Path(f"/proc/{process.pid}/mem").stat().st_uid)
        time.sleep(0.02)
    process.communicate()

    assert process.returncode == 0
    assert owners[0] == os.getuid()
    assert owners.count(0) > 5, "an ended process belongs to root as well, until it is collected"
