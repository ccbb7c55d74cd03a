"""Coverage-guided fuzzing of the ClientHello reader: `python tests/fuzz/atheris_clienthello.py -max_total_time=60`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
    from cloister.egress.clienthello import HelloReader


def feed(data: bytes, step: int) -> object:
    """Feed a reader in steps."""
    reader = HelloReader()
    for at in range(0, len(data), step):
        result = reader.feed(data[at : at + step])
        if result is not None:
            return result
    return None


def one(data: bytes) -> None:
    """Never fail, and give one answer however the bytes are cut."""
    if feed(data, 7) != feed(data, max(len(data), 1)):
        raise AssertionError("cutting the bytes changes the answer")


atheris.Setup(sys.argv, one)
atheris.Fuzz()
