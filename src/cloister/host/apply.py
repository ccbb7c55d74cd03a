"""Applying the steps of a plan to this machine, and undoing them. One `match`, one door per step.

`undo` needs nothing but the plan: it is called in order at the end of a run, and by the next
broker for runs whose broker was killed. So it may meet steps that were never applied, or
half, and must be right in all cases. It removes only what lies below our own directories, and
placeholders that are still ours.

`Launch` is not applied here: it needs the caller's descriptors and is done by frames. Nor is
`LimitScope`, which needs the sandbox's first process (`host/limits.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from typing import assert_never

from cloister.errors import StepError
from cloister.host import limits, pasta
from cloister.host.carry import make_point, seed_file
from cloister.host.placeholders import Journal
from cloister.plan.steps import (
    AnyStep,
    CarryPoints,
    IdentityTokens,
    Launch,
    LimitCgroup,
    LimitScope,
    Listen,
    MakeDirectory,
    Placeholders,
    Plan,
    SeedFile,
    WriteFile,
)

_BACKLOG = 512
_SUN_PATH_BYTES = 107  # unix(7): sun_path holds 108 bytes with the NUL


class Applied:
    """What applying a plan made that cannot stand in it: the listening socket."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.listener: socket.socket | None = None


def apply(plan: Plan, state: str) -> Applied:
    """Apply every step before the launch; undo what was done when one fails.

    Args:
        plan: as stored already.
        state: Cloister's state directory, where placeholder journals lie.

    Raises:
        StepError: names the step and what the system said.
    """
    applied = Applied()
    for step in plan.steps:
        try:
            _apply(step, plan, state, applied)
        except OSError as error:
            if applied.listener:
                applied.listener.close()
            undo(plan, state)
            raise StepError(
                "step-refused", f"could not {step.describe()}: {error.strerror}", where=str(error.filename or "")
            ) from error
        except BaseException:
            if applied.listener:
                applied.listener.close()
            undo(plan, state)
            raise
    return applied


def undo(plan: Plan, state: str) -> None:
    """Undo every step in reverse order; missing things are fine, and one failure does not stop the rest."""
    for step in reversed(plan.steps):
        with contextlib.suppress(OSError):
            _undo(step, plan, state)


def _apply(step: AnyStep, plan: Plan, state: str, applied: Applied) -> None:
    match step:
        case MakeDirectory(path=path, mode=mode):
            os.makedirs(path, mode=mode, exist_ok=True)
        case WriteFile(path=path, text=text, mode=mode):
            _write(path, text, mode)
        case Listen(path=path):
            applied.listener = _listen(path)
        case CarryPoints(root=root, points=points):
            for point in points:
                make_point(root, point.name, point.kind)
        case SeedFile(root=root, name=name, text=text):
            seed_file(root, name, text)
        case Placeholders(points=points):
            Journal(state).make(plan.run, points)
        case LimitCgroup():
            limits.make(step)
        case LimitScope() | Launch() | IdentityTokens():
            return  # they need processes (limits.enter, frames to the shim) or keys (runs/identity.py)
        case _:
            assert_never(step)


def _undo(step: AnyStep, plan: Plan, state: str) -> None:
    match step:
        case MakeDirectory(path=path, kept=False):
            shutil.rmtree(path, ignore_errors=True)
        case Placeholders():
            Journal(state).release(plan.run)
        case LimitCgroup() | LimitScope():
            limits.leave(step)
        case Listen(path=path):
            os.unlink(path)
        case Launch(pasta=pasta_argv) if pasta_argv:
            pasta.end_recorded(next(step.path for step in plan.steps if isinstance(step, MakeDirectory)))
        case MakeDirectory() | WriteFile() | CarryPoints() | SeedFile() | IdentityTokens() | Launch():
            return  # inside a directory that goes as a whole, or kept on purpose
        case _:
            assert_never(step)


def _write(path: str, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _listen(path: str) -> socket.socket:
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise StepError(
            "socket-path-too-long", f"a Unix socket's path holds {_SUN_PATH_BYTES} bytes", where=path,
            remedy="set XDG_RUNTIME_DIR to a shorter directory",
        )  # fmt: skip
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
