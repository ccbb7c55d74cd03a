"""What every verb about runs needs: this user's places and records, and a word with the broker if there is one."""

from __future__ import annotations

import os
import re
from typing import Any

import msgspec

from cloister.errors import CloisterError
from cloister.runs import client
from cloister.runs.paths import Paths, locate
from cloister.runs.store import Store

_HEAD = re.compile(r"cloister: (.*) \[([a-z0-9-]+)\]")


class BrokerError(CloisterError):
    """An error the broker answered with; the exit code is the broker's."""

    def __init__(self, code: int, text: str) -> None:
        """Take the rendered error apart again."""
        first, _, rest = text.strip().partition("\n")
        found = _HEAD.fullmatch(first)
        parts = dict(line.strip().partition(": ")[::2] for line in rest.splitlines())
        message, reference = (found[1], found[2]) if found else (first or "the broker refused", "broker-refused")
        super().__init__(reference, message, where=parts.get("where", ""), remedy=parts.get("try", ""))
        self.exit_code = code


def places() -> Paths:
    """Return where this user's things are."""
    return locate(os.environ, client.home(), os.getuid())


def store() -> Store:
    """Return this user's run store."""
    return Store(places().runs)


def living() -> frozenset[str] | None:
    """Return the ids of living runs by the broker's word; None when no broker runs, so nothing lives."""
    answer = ask_living({"verb": "living"})
    return None if answer is None else frozenset(answer["runs"])


def ask_living(fields: dict[str, str]) -> dict[str, Any] | None:
    """Ask the broker where one runs, and start none; None when nobody is there.

    Raises:
        BrokerError: what the broker refused.
    """
    answer = client.ask_running(fields)
    return None if answer is None else _decode(answer)


def control(fields: dict[str, str]) -> dict[str, Any]:
    """Send a control request to the broker, starting it when needed.

    Raises:
        BrokerError: what the broker refused.
        RetryError: there is no broker to be had.
    """
    return _decode(client.ask(fields))


def _decode(answer: tuple[int, bytes]) -> dict[str, Any]:
    code, payload = answer
    if code:
        raise BrokerError(code, payload.decode("utf-8", "replace"))
    return msgspec.json.decode(payload, type=dict[str, Any])
