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
from cloister.host.trust_roots import bundle
from cloister.plan.steps import (
    AnyStep,
    CarryPoints,
    Launch,
    LimitCgroup,
    LimitScope,
    Listen,
    MakeDirectory,
    Placeholders,
    Plan,
    SeedFile,
    TrustBundle,
    WriteFile,
)

_BACKLOG = 512
_SUN_PATH_BYTES = 107  # unix(7): sun_path holds 108 bytes with the NUL


class Applied:
    """What applying a plan needs or makes that cannot stand in it: our certificate, the listening socket."""

    def __init__(self, authority: bytes) -> None:
        """Start with no socket."""
        self.authority = authority
        self.listener: socket.socket | None = None


def apply(plan: Plan, state: str, authority: bytes = b"") -> Applied:
    """Apply every step before the launch; undo what was done when one fails.

    Args:
        plan: as stored already.
        state: Cloister's state directory, where placeholder journals lie.
        authority: the certificate of this user's authority (PEM), for runs whose plan has a bundle.

    Raises:
        StepError: names the step and what the system said.
    """
    applied = Applied(authority)
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
        case WriteFile() | TrustBundle():
            _write(step, applied)
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
        case LimitScope() | Launch():
            return  # both need processes: limits.enter, and frames to the shim
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
        case MakeDirectory() | WriteFile() | TrustBundle() | CarryPoints() | SeedFile() | Launch():
            return  # inside a directory that goes as a whole, or kept on purpose
        case _:
            assert_never(step)


def _write(step: WriteFile | TrustBundle, applied: Applied) -> None:
    text, mode = (
        (step.text, step.mode) if isinstance(step, WriteFile) else (bundle(step.roots, applied.authority), 0o600)
    )
    descriptor = os.open(step.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
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
