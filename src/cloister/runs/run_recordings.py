"""Which runs of one broker are recorded: from the policy's word to a recorder at the run's caller, and its end.

Nothing of recordings is imported before the first run that wants one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.relay.llm.service import Caller
    from cloister.runs.active import ActiveRun
    from cloister.runs.identity_store import IdentityStore
    from cloister.runs.recordings import Recorder

JOIN_S = 5.0
"""How long the broker's end waits for what is not written yet."""


class RunRecordings:
    """The recordings of living runs."""

    def __init__(self, identities: Callable[[], IdentityStore]) -> None:
        """Open nothing yet; `identities` opens the key store."""
        self._identities = identities
        self._wrapping = b""
        self._recorders: dict[str, Recorder] = {}
        self._ended: list[Recorder] = []

    def unlock(self) -> None:
        """Have the key ready with which recordings are sealed. May wait for the key store.

        Raises:
            CloisterError: the key store cannot be opened.
        """
        if not self._wrapping:
            from cloister.llm.recording import PURPOSE

            self._wrapping = self._identities().derive(PURPOSE)

    def obey(self, run: ActiveRun, caller: Caller, *, wanted: bool) -> None:
        """Write a run's calls down from now on, or no longer; one that begins again goes on in the same file.

        `unlock` comes before.
        """
        if not wanted:
            caller.recorder = None
            return
        if caller.recorder is not None:
            return
        from cloister.runs.recordings import FILE, Recorder

        name = run.plan.run
        if name not in self._recorders:
            path = f"{os.path.dirname(run.store.events_path(name))}/{FILE}"
            soon = asyncio.get_running_loop().call_soon_threadsafe
            self._recorders[name] = Recorder(path, name, self._wrapping, run.write_event, soon)
        caller.recorder = self._recorders[name]
        run.write_event("recording", {"file": FILE})

    def left(self, run: str) -> tuple[str, ...]:
        """Close a run's recording behind its last call; return what its receipt says."""
        recorder = self._recorders.pop(run, None)
        if recorder is None:
            return ()
        recorder.finish()
        self._ended = [one for one in self._ended if one.alive]
        self._ended.append(recorder)
        return recorder.summary()

    def close(self) -> None:
        """Wait until everything is written; no call is under way any more."""
        for recorder in (*self._recorders.values(), *self._ended):
            recorder.finish()
            recorder.join(JOIN_S)
