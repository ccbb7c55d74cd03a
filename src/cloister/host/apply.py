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
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never

from cloister.errors import StepError
from cloister.host import limits, pasta, removal
from cloister.host.carry import make_point, seed_file
from cloister.host.placeholders import Journal
from cloister.host.plain_files import read_settings
from cloister.host.trust_roots import bundle
from cloister.plan.settings import merged, merged_models
from cloister.plan.steps import (
    AnyStep,
    CarryPoints,
    IdentityTokens,
    Launch,
    LimitCgroup,
    LimitScope,
    Listen,
    ListenAgent,
    MakeDirectory,
    MakeLink,
    MergeSettings,
    PlaceholderFile,
    Placeholders,
    Plan,
    SeedFile,
    TrustBundle,
    WriteBytes,
    WriteFile,
)

_Written = WriteFile | WriteBytes | TrustBundle | PlaceholderFile | MergeSettings
NOTHING: Mapping[str, str] = MappingProxyType({})
_BACKLOG = 512
_SUN_PATH_BYTES = 107  # unix(7): sun_path holds 108 bytes with the NUL


class Applied:
    """What applying a plan needs or makes that cannot stand in it: certificate, placeholders, listening sockets."""

    def __init__(self, authority: bytes, placeholders: Mapping[str, str]) -> None:
        """Start with no socket."""
        self.authority = authority
        self.placeholders = placeholders
        self.listener: socket.socket | None = None
        self.agents: dict[str, socket.socket] = {}
        """The sockets of `ListenAgent` steps, by kind."""

    def listen(self, step: Listen | ListenAgent) -> None:
        """Open a step's socket."""
        if isinstance(step, Listen):
            self.listener = _listen(step.path, step.mode)
        else:
            self.agents[step.kind] = _listen(step.path, step.mode)

    def close(self) -> None:
        """Close every socket."""
        for listener in (self.listener, *self.agents.values()):
            if listener is not None:
                listener.close()


def apply(plan: Plan, state: str, authority: bytes = b"", placeholders: Mapping[str, str] = NOTHING) -> Applied:
    """Apply every step before the launch; undo what was done when one fails.

    Args:
        plan: as stored already.
        state: Cloister's state directory, where placeholder journals lie.
        authority: the certificate of this user's authority (PEM), for runs whose plan has a bundle.
        placeholders: what stands for each credential, for runs whose plan has files with them.

    Raises:
        StepError: names the step and what the system said.
    """
    applied = Applied(authority, placeholders)
    for step in plan.steps:
        try:
            _apply(step, plan, state, applied)
        except OSError as error:
            applied.close()
            undo(plan, state)
            raise StepError(
                "step-refused", f"could not {step.describe()}: {error.strerror}", where=str(error.filename or "")
            ) from error
        except BaseException:
            applied.close()
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
        case MakeDirectory() | MakeLink():
            _make(step)
        case WriteFile() | WriteBytes() | TrustBundle() | PlaceholderFile() | MergeSettings():
            _write(step, applied)
        case Listen() | ListenAgent():
            applied.listen(step)
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
            removal.sweep(path)
        case Placeholders():
            Journal(state).release(plan.run)
        case LimitCgroup() | LimitScope():
            limits.leave(step)
        case Listen(path=path) | ListenAgent(path=path):
            os.unlink(path)
        case Launch(pasta=pasta_argv, unit=None) if pasta_argv:
            pasta.end_recorded(next(step.path for step in plan.steps if isinstance(step, MakeDirectory)))
        case MakeDirectory() | WriteFile() | WriteBytes() | MakeLink() | TrustBundle() | PlaceholderFile():
            return  # inside a directory that goes as a whole
        case MergeSettings() | CarryPoints() | SeedFile() | IdentityTokens() | Launch():
            return  # kept on purpose, or gone by itself
        case _:
            assert_never(step)


def _make(step: MakeDirectory | MakeLink) -> None:
    if isinstance(step, MakeLink):
        os.symlink(step.target, step.path)
        return
    os.makedirs(step.path, mode=step.mode, exist_ok=True)
    if step.mode & 0o077:  # for another uid, whatever our umask is
        os.chmod(step.path, step.mode)


def _write(step: _Written, applied: Applied) -> None:
    data = _content(step, applied)
    descriptor = os.open(step.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, step.mode)
    with os.fdopen(descriptor, "wb") as file:
        if step.mode & 0o077:  # for another uid, whatever our umask is
            os.fchmod(descriptor, step.mode)
        file.write(data)


def _content(step: _Written, applied: Applied) -> bytes:
    match step:
        case MergeSettings():
            host = read_settings(step.source)[0]
            if step.models:
                return merged_models(host, step.settings)[0]
            return merged(host, step.settings, step.form)[0]
        case WriteBytes():
            return step.data
        case WriteFile():
            text = step.text
        case TrustBundle():
            text = bundle(step.roots, applied.authority)
        case PlaceholderFile():
            text = step.text.replace("{placeholder}", applied.placeholders[step.credential])
    return text.encode("utf-8", "surrogateescape")


def _listen(path: str, mode: int) -> socket.socket:
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise StepError(
            "socket-path-too-long", f"a Unix socket's path holds {_SUN_PATH_BYTES} bytes", where=path,
            remedy="set XDG_RUNTIME_DIR to a shorter directory",
        )  # fmt: skip
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, mode)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
