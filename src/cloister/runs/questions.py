"""A question to the person at a run's terminal, one at a time, with an end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.runs.active import ActiveRun

ASK_TIMEOUT_S = 120.0
"""After that the question is taken off the terminal, since the agent's output waits behind it."""
NOBODY = "-"
"""The answer of nobody."""


async def ask_letter(run: ActiveRun, text: str, letters: str, default: str) -> str:
    """Return one of the letters; the default for Enter, and `NOBODY` where nobody answered in time."""
    got: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def answered(letter: str) -> None:
        if not got.done():
            got.set_result(letter)

    run.ask(text, letters, default, answered, nobody=NOBODY)
    timer = asyncio.get_running_loop().call_later(ASK_TIMEOUT_S, run.withdraw_question)
    try:
        return await got
    finally:
        timer.cancel()
