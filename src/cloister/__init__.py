"""Cloister runs AI agents on Linux where they cannot hurt their owner.

    policy  ──compile──▶  plan  ──apply──▶  host
    (may)     pure        (how)   the only room that touches the machine

Agent (who), Policy (what it may do), Plan (how that is enforced, as data), Sandbox (where it
runs), Run (what happened). ARCHITECTURE.md draws the rooms. Importing this package does
nothing and costs nothing: `Sandbox` is looked up when it is first asked for.
"""

from __future__ import annotations

__all__ = ["Sandbox", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the Python API only for who uses it."""
    if name == "Sandbox":
        from cloister.runs.sandbox import Sandbox

        return Sandbox
    raise AttributeError(name)
