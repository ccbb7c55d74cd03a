"""The credentials of a run that is about to start: secrets looked at once, an authority, placeholders.

Everything that can go wrong goes wrong here, before anything was changed on the host. What
needs a cryptographic library is imported with the first run that needs it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister.errors import StepError
from cloister.host.secrets import Provider, SecretReader, Surroundings
from cloister.isolation.environment import terminates
from cloister.runs.credentials_places import writable_places
from cloister.runs.login_secrets import LoginSecrets
from cloister.runs.paths import Paths
from cloister.runs.prepare import Prepared
from cloister.runs.request import RunRequest

if TYPE_CHECKING:
    from cloister.runs.authority import Authorities, Trusted
    from cloister.runs.credentials import RunCredentials
    from cloister.runs.logins import LoginEvent


class CredentialStarts:
    """What the runs of one broker share: the authority, and who else can read references."""

    def __init__(self, paths: Paths, uid: int, record: Callable[[LoginEvent], None]) -> None:
        """Look at nothing yet; `record` gets what happens to logins."""
        self._paths = paths
        self._uid = uid
        self._authorities: Authorities | None = None
        self.logins = LoginSecrets(paths.logins, record)
        self.providers: dict[str, Provider] = {"login": self.logins.read}
        """Schemes that others read; they count for runs that start from now on."""

    async def open(self, prepared: Prepared, request: RunRequest) -> RunCredentials:
        """Return the credentials of a run, each secret read once.

        Raises:
            CloisterError: a secret cannot be had, or the authority cannot be kept.
        """
        from cloister.runs.credentials import RunCredentials
        from cloister.runs.login_files import describer, token_places

        around = Surroundings(
            home=self._paths.home,
            uid=self._uid,
            environment=request.environment,
            own=os.environ,
            forbidden=writable_places(prepared.plan, self._paths.state),
        )
        trusted = await self._trusted() if terminates(prepared.agent) else None
        reader = SecretReader(around, self.providers, refusals={"login": self.logins.refused})
        agent = prepared.agent
        owned = token_places(agent, describer(self._paths.logins))
        memory = prepared.kept.memory if prepared.kept else None
        former = memory.placeholders if memory else {}
        credentials = RunCredentials(agent.credentials, reader, trusted, owned, former)
        await credentials.check()
        return credentials

    async def _trusted(self) -> Trusted:
        from cloister.runs.authority import Authorities

        if self._authorities is None:
            self._authorities = Authorities(self._paths.state)
        try:
            return await asyncio.get_running_loop().run_in_executor(None, self._authorities.current)
        except OSError as error:
            raise StepError(
                "authority-unusable", f"the certificate authority for sandboxes cannot be kept: {error.strerror}",
                where=f"{self._paths.state}/authority", remedy=f"chown -R $USER {self._paths.state}",
            ) from None  # fmt: skip
