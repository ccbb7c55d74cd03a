"""The reference `login:NAME` for everything in the broker that reads secrets: one owner, made with its first use.

The owner brings an HTTP client and a TLS library along, so neither is loaded by a broker whose runs have no login.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.runs.logins import LoginEvent, Logins


class LoginSecrets:
    """Access tokens, as `host.secrets` asks for them."""

    def __init__(self, directory: str, record: Callable[[LoginEvent], None]) -> None:
        """Look at nothing yet.

        Args:
            directory: of the store (`Paths.logins`).
            record: gets what happens to logins.
        """
        self._directory = directory
        self._record = record
        self._owner: Logins | None = None
        self._given: dict[str, str] = {}

    async def read(self, name: str) -> bytes:
        """Return an access token that is good now.

        Raises:
            CloisterError: see `Logins.access_token`.
        """
        token = self._given[name] = await self._logins().access_token(name)
        return token.encode("ascii")

    def refused(self, name: str) -> None:
        """A host that the login is for said 401 to the token that was given out last."""
        if name in self._given:
            self._logins().refused(name, self._given[name])

    async def close(self) -> None:
        """Let renewals under way come to their end."""
        if self._owner is not None:
            await self._owner.close()

    def _logins(self) -> Logins:
        if self._owner is None:
            from cloister.runs.login_renewal import poster
            from cloister.runs.logins import Logins

            self._owner = Logins(self._directory, send=poster(os.environ), record=self._record)
        return self._owner
