"""What the user answered with `always` and `never`, per agent, kept beside the policy.

`always` grants a host and port that the policy neither allows nor denies; it never lifts a
deny rule or the address guard. The file is the user's: no agent can see its directory.
"""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from cloister.runs.policies import stamp

Kept = Literal["always", "never"]


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kept answer."""

    agent: str
    host: str
    port: int
    answer: Kept
    """What was said."""


class Approvals:
    """The file of kept answers."""

    def __init__(self, path: str) -> None:
        """Read it when it is first needed, and again when it has changed."""
        self._path = path
        self._stamp = (0, 0, 0)
        self._kept: dict[tuple[str, str, int], Kept] = {}

    def find(self, agent: str, host: str, port: int) -> Kept | Literal[""]:
        """Return `always`, `never`, or nothing. Edits of the file count from the next call on."""
        now = stamp(self._path)
        if now != self._stamp:
            self._stamp = now
            self._kept = {(one.agent, one.host, one.port): one.answer for one in self._read()}
        return self._kept.get((agent, host, port), "")

    def keep(self, agent: str, host: str, port: int, answer: Kept) -> None:
        """Add an answer, in the place of an earlier one.

        Raises:
            OSError: the configuration directory cannot be written.
        """
        kept = [one for one in self._read() if (one.agent, one.host, one.port) != (agent, host, port)]
        kept.append(Decision(agent, host, port, answer))
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        partial = f"{self._path}.new"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")
        os.rename(partial, self._path)

    def _read(self) -> list[Decision]:
        """Return all kept answers; a file that cannot be read grants nothing."""
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(), type=list[Decision])
        except (OSError, msgspec.DecodeError):
            return []
