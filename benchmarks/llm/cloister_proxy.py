"""How Cloister's own inference proxy is started for the benchmark: by the documented command, with every check on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Setup(NamedTuple):
    """A command, and how a request passes it."""

    argv: Sequence[str]
    environment: dict[str, str]
    port: int
    token: str
    rows: Callable[[], int]


def missing() -> str:
    """Return why it cannot be started, empty when it can."""
    return "not there yet"


def prepare(folder: Path, upstream_port: int, key: str, port: int) -> Setup:
    """Write its policy."""
    raise RuntimeError
