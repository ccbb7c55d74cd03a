"""What a user's broker has imported. It lets nobody look into it, so it is started with Python's own record of that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from support.cloister import User


class WatchedBroker:
    """The broker of a user, started before `cloister` would start it; ended with the user, or at the end of this."""

    def __init__(self, user: User) -> None:
        """Remember the user."""
        self._user = user

    def __enter__(self) -> Self:
        """Start it, and wait until it listens."""
        ready, told = os.pipe()
        words = [sys.executable, "-I", "-X", "importtime", "-m", "cloister.services.broker", "--ready-fd", str(told)]
        self._early = self._user.home / "broker.imports"
        with self._early.open("wb") as log:
            self._process = subprocess.Popen(
                words, env=self._user.environment, cwd="/", pass_fds=(told,), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        os.close(told)
        assert os.read(ready, 1), self._early.read_text()
        os.close(ready)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)

    def loaded(self) -> set[str]:
        """Return the modules imported so far: its messages go to its log soon after it listens."""
        log = self._user.state / "broker.log"
        until = time.monotonic() + 20
        while not log.exists() and time.monotonic() < until:
            time.sleep(0.01)
        text = self._early.read_text() + log.read_text()
        lines = [line for line in text.splitlines() if line.startswith("import time:")]
        return {line.rpartition("|")[2].strip() for line in lines}
