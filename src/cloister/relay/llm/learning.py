"""Asking the books what was used before, outside the event loop: a database that hangs holds up one request, not all.

Budgets ask once per agent and span. Requests that need the same answer share the question and wait for it, within
bounds; whoever gets none is refused, since nobody knows what is left.
"""

from __future__ import annotations

import asyncio
import time

from cloister.errors import CloisterError
from cloister.llm.budgets import Account, Unknown
from cloister.llm.errors import Refusal

_AGAIN_S = 5


class Learner:
    """The questions of one process."""

    def __init__(self, patience_s: float) -> None:
        """Ask nothing yet; `patience_s` is how long a request waits."""
        self._patience_s = patience_s
        self._under_way: dict[tuple[Account, object], asyncio.Task[None]] = {}

    async def learn(self, account: Account, unknown: list[Unknown]) -> Refusal | None:
        """Let an account know what the books have; a refusal where that cannot be known in time."""
        try:
            async with asyncio.timeout(self._patience_s):
                for one in unknown:
                    await asyncio.shield(self._question(account, one))
        except TimeoutError:
            words = f"what was used before is not known after {self._patience_s:g} s: the ledger does not answer"
            return Refusal(503, "ledger-unavailable", words, _AGAIN_S)
        except (CloisterError, OSError) as error:
            words = (
                error.message if isinstance(error, CloisterError) else f"the ledger cannot be read: {error.strerror}"
            )
            return Refusal(503, "ledger-unavailable", words, _AGAIN_S)
        return None

    def _question(self, account: Account, one: Unknown) -> asyncio.Task[None]:
        """Return the task that asks one question, a new one or that under way."""
        key = (account, one.key)
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.get_running_loop().create_task(self._ask(account, one))
            task.add_done_callback(lambda done: self._settle(key, done))
        return task

    async def _ask(self, account: Account, one: Unknown) -> None:
        spent = await asyncio.get_running_loop().run_in_executor(None, account.ask, one)
        account.learn(one, spent, time.monotonic())

    def _settle(self, key: tuple[Account, object], done: asyncio.Task[None]) -> None:
        self._under_way.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen: whoever waited has it, and nobody has to
