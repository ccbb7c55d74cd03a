"""What a caller asks for: the request of `cloister run` as the broker reads it. Bytes in, value out."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from cloister.errors import UsageError

MAX_ITEMS = 65536


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
    run: str = ""
    """The run's id where the caller chose it; else the broker does."""


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
        run=fields.get("id", ""),
    )
