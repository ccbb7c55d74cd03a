"""What cases need beside the canaries, prepared only when one of them asks for it: a neighbour run, mostly.

Everything is handed to an exit stack, so it ends when the group of cases does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cloister.prove.case import Case

if TYPE_CHECKING:
    from cloister.prove.runner import Battery

_SIBLING = """
import os, socket, time
from cloister.prove.inside.support import syscall

def attack(box):
    driver = os.getppid()
    if os.fork() == 0:
        os.setsid()  # the driver ends a case's own group when it has answered
        os.closerange(0, 64)
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind("\\0cloister-prove-sibling")
        abstract.listen()
        tcp = socket.socket()
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind(("127.0.0.1", 47811))
        tcp.listen()
        paths = [folder + "/cloister-prove-sibling" for folder in ("/tmp", "/dev/shm", os.environ["HOME"])]
        for path in paths:
            with open(path, "w") as file:
                file.write("sibling")
        segment = syscall("shmget", 0x50524F56, 4096, 0o1666)
        while os.path.exists(f"/proc/{driver}"):
            time.sleep(0.1)
        for path in paths:
            os.unlink(path)
        syscall("shmctl", segment, 0, 0)
        os._exit(0)
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", 47811), 2), socket.socket(socket.AF_UNIX) as client:
        client.connect("\\0cloister-prove-sibling")
    box.stopped("ready")
"""


_KEY = """
import os

def attack(box):
    print(os.environ.get(str(box.fact("model_key")), ""))
    box.stopped("ready")
"""


def prepare(cases: Iterable[Case], battery: Battery, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Prepare what the cases need; return facts about it."""
    facts: dict[str, Any] = {}
    for need in dict.fromkeys(need for case in cases for need in case.needs):
        if need in NEEDS:
            facts |= NEEDS[need](battery, stack)
    return facts


def _sibling(battery: Battery, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Start another run of the same agent, with files, sockets and shared memory in it."""
    workspace, _ = _other_run(battery, stack, _SIBLING)
    return {"sibling": {"name": "cloister-prove-sibling", "port": 47811, "key": 0x50524F56, "workspace": workspace}}


def _sibling_key(battery: Battery, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Start another run of the same agent, and have it give away its key for models: a placeholder, as all of them."""
    _, answer = _other_run(battery, stack, _KEY)
    return {"sibling_key": str(answer.get("printed", "")).strip()}


def _other_run(battery: Battery, stack: contextlib.ExitStack, source: str) -> tuple[str, dict[str, Any]]:
    """Start a run that lives as long as the cases are tried; return its workspace and what its program answered."""
    workspace = battery.workspace("clone")
    session = stack.enter_context(battery.session(workspace))
    facts = battery.facts | {"workspace": workspace}
    request = {"id": "sibling", "source": source, "function": "attack", "twin": False, "facts": facts, "limit_s": 5.0}
    answer = session.ask(request)
    if answer["outcome"] != "denied":
        raise OSError(f"the neighbour run could not be prepared: {answer['detail']}")
    return workspace, answer


def _project_policy(battery: Battery, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Have workspaces made with a project file in them, as an owner would put it there."""
    battery.project_policy = True
    stack.callback(setattr, battery, "project_policy", False)
    return {}


NEEDS: dict[str, Callable[[Any, contextlib.ExitStack], dict[str, Any]]] = {
    "sibling": _sibling,
    "sibling-key": _sibling_key,
    "project-policy": _project_policy,
}
"""Other needs name facts that are always there (`canaries.py`, `battery.py`)."""
