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
import os, socket
from cloister.prove.inside.support import syscall
def attack(box):
    if os.fork() == 0:
        for number in range(64):
            try: os.close(number)
            except OSError: pass
        abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0cloister-prove-sibling"); abstract.listen()
        tcp = socket.socket(); tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); tcp.bind(("127.0.0.1", 47811)); tcp.listen()
        for path in ("/tmp/cloister-prove-sibling", "/dev/shm/cloister-prove-sibling", os.environ["HOME"] + "/cloister-prove-sibling"):
            with open(path, "w") as file: file.write("sibling")
        syscall("shmget", 0x50524F56, 4096, 0o1666)
        import time
        time.sleep(600)
    import time
    time.sleep(0.3)
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
    workspace = battery.workspace("clone")
    session = stack.enter_context(battery.session(workspace))
    request = {
        "id": "sibling",
        "source": _SIBLING,
        "function": "attack",
        "twin": False,
        "facts": {"workspace": workspace},
        "limit_s": 5.0,
    }
    answer = session.ask(request)
    if answer["outcome"] != "denied":
        raise OSError(f"the neighbour run could not be prepared: {answer['detail']}")
    return {"sibling": {"name": "cloister-prove-sibling", "port": 47811, "key": 0x50524F56, "workspace": workspace}}


def _project_policy(battery: Battery, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Have workspaces made with a project file in them, as an owner would put it there."""
    battery.project_policy = True
    stack.callback(setattr, battery, "project_policy", False)
    return {}


NEEDS: dict[str, Callable[[Any, contextlib.ExitStack], dict[str, Any]]] = {
    "sibling": _sibling,
    "project-policy": _project_policy,
}
"""Other needs name facts that are always there (`canaries.py`, `battery.py`)."""
