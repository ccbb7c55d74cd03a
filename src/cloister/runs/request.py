"""What a caller asks for: the request of `cloister run` as the broker reads it. Bytes in, value out."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping

import msgspec

from cloister.errors import UsageError
from cloister.host.frames import Frame, FrameError, decode_list


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request to start an agent. `environment` is the caller's, and is never stored."""

    agent: str
    words: tuple[str, ...] = ()
    replaced: bool = False
    """`words` replace the agent's command instead of being appended to it."""
    directory: str = ""
    profile: str = ""
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    extra_names: tuple[str, ...] = ()
    pty: bool = False
    yes: bool = False
    detach: bool = False
    json: bool = False
    machine: str = ""
    """Asked for by `cloister vm`: the agent must be one that runs in a microVM."""
    model: str = ""
    """The one model that this run may use, of those that the policy allows."""
    memory: str = ""
    """Memory of the guest, no more than the policy says."""
    cpus: str = ""
    """Processors of the guest, no more than the policy says."""
    snapshot: str = ""
    """The snapshot whose disks the guest gets."""
    resume: bool = False
    """Its processes go on from that snapshot's memory."""
    run: str = ""
    """The run's id where the caller chose it; else the broker does."""


class Incoming:
    """A request that is still coming in: frames L, perhaps U, V and N, in this order. Owns its descriptors."""

    def __init__(self) -> None:
        """Wait for the first frame."""
        self.fields: dict[str, str] = {}
        self.part = b""
        """The user's part, of a run under systemd."""
        self.words: list[bytes] = []
        self.descriptors: tuple[int, ...] = ()
        self._begun = False

    def take(self, frame: Frame) -> list[bytes] | None:
        """Take a frame; return the environment when the request is whole, else None.

        Raises:
            FrameError: it does not belong there; its descriptors are closed.
        """
        if frame.kind == "L" and not self._begun:
            self.descriptors, self._begun = frame.descriptors, True
            self.fields = decode_fields(decode_list(frame.payload)[0])
            return None
        for descriptor in frame.descriptors:
            os.close(descriptor)
        if not self._begun or frame.descriptors:
            raise FrameError(f"a frame {frame.kind!r} does not belong there")
        match frame.kind:
            case "U":
                self.part = frame.payload
            case "V":
                self.words = decode_list(frame.payload)[0]
            case "N":
                return decode_list(frame.payload)[0]
            case _:
                raise FrameError(f"a frame {frame.kind!r} does not belong there")
        return None

    def close(self) -> None:
        """Close what came with the request."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors = ()


def decode_fields(items: list[bytes]) -> dict[str, str]:
    """Return `name=value` items as a dict."""
    pairs = (os.fsdecode(item).partition("=") for item in items)
    return {name: value for name, _, value in pairs}


def decode(fields: Mapping[str, str], words: list[bytes], environment: list[bytes]) -> RunRequest:
    """Build a request.

    Raises:
        UsageError: a field is missing, or an argument cannot be passed to execve(2).
    """
    if any(b"\0" in word for word in words):
        raise UsageError("argument-invalid", "an argument holds a NUL byte")
    variables = (os.fsdecode(item).partition("=") for item in environment)
    return RunRequest(
        agent=fields.get("agent", ""),
        words=tuple(os.fsdecode(word) for word in words),
        replaced=bool(fields.get("replaced")),
        directory=fields.get("directory", ""),
        profile=fields.get("profile", ""),
        environment={name: value for name, equals, value in variables if equals and name},
        extra_names=tuple(name for name in fields.get("env", "").split(",") if name),
        pty=bool(fields.get("pty")),
        yes=bool(fields.get("yes")),
        detach=bool(fields.get("detach")),
        json=bool(fields.get("json")),
        machine=fields.get("machine", ""),
        model=fields.get("model", ""),
        memory=fields.get("memory", ""),
        cpus=fields.get("cpus", ""),
        snapshot=fields.get("snapshot", ""),
        resume=bool(fields.get("resume")),
        run=fields.get("id", ""),
    )


def check_stdio(descriptors: tuple[int, ...]) -> None:
    """Refuse a directory as standard input or output: openat(2) on it would lead out of the sandbox.

    Raises:
        UsageError: names the stream.
    """
    if len(descriptors) < len(("input", "output", "error")):
        raise UsageError("stdio-missing", "the request came without its standard input, output and error")
    for name, descriptor in zip(("input", "output", "error"), descriptors, strict=False):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise UsageError(
                "stdio-directory", f"standard {name} is a directory, which would open the host's files to the agent"
            )
