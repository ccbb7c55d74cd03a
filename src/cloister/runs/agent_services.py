"""The filtered agent sockets of one run, from its start to its end: filters, sockets and records put together."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping

from cloister.credentials.signing import SigningEvent
from cloister.errors import CloisterError
from cloister.policy.model import Agent
from cloister.relay.agent_sockets import AgentServer
from cloister.runs.signing import look_up_keys
from cloister.runs.signing_model import Sources

_MAX_COUNTED = 200
"""Lines of a summary: user names come from the agent."""


class Signers:
    """The sockets on which a run's programs have signatures made."""

    def __init__(self, sources: Sources, uid: int, record: Callable[[SigningEvent], None]) -> None:
        """Know the person's agents; serve nothing yet."""
        self._sources = sources
        self._uid = uid
        self._record = record
        self._servers: list[AgentServer] = []
        self._used: Counter[str] = Counter()

    async def start(self, listeners: Mapping[str, socket.socket]) -> None:
        """Serve on bound sockets, by kind; `close` closes them."""
        for kind, listener in listeners.items():
            server = self._ssh() if kind == "ssh" else self._gpg()
            await server.start(listener)
            self._servers.append(server)

    async def close(self) -> None:
        """End every connection: from now on the keys are out of reach."""
        for server in self._servers:
            await server.close()

    def obey(self, agent: Agent) -> str:
        """Put a changed policy in force, also for open connections; return why no key is left, if that is so.

        Where the agents are stays as it was at the start, and so do the files inside: a host that is new in the
        policy can be logged in to by the next run.
        """
        situation, why = self._sources.situation, ""
        if situation is None:
            return ""
        try:
            sources = look_up_keys(agent, situation)[1]
        except CloisterError as error:
            sources, why = Sources(agent=self._sources.agent, situation=situation), error.message
        before, self._sources = self._sources, sources
        if (before.ring, before.gpg_grants) != (sources.ring, sources.gpg_grants):
            for server in self._servers:
                server.drop()
        return why

    def summary(self) -> tuple[str, ...]:
        """Return for the receipt which key was used how often and for what."""
        return tuple(f"{what}: {count} signatures" for what, count in sorted(self._used.items()))

    def _note(self, event: SigningEvent) -> None:
        """Count a signature, and record everything."""
        if event.verdict == "allow":
            what = f"{event.credential}: " + (f"ssh to {event.user}@{event.host}" if event.use == "ssh" else event.use)
            if what in self._used or len(self._used) < _MAX_COUNTED:
                self._used[what] += 1
        self._record(event)

    def _ssh(self) -> AgentServer:
        from cloister.credentials.ssh_agent import Ring, SshAgentFilter
        from cloister.relay.ssh_agent import LIMIT, SshAgentClients

        def make_filter() -> SshAgentFilter:
            return SshAgentFilter(self._sources.ring or Ring(self._sources.agent, (), {}), time.time)

        return AgentServer(SshAgentClients(self._sources.ssh, self._uid, make_filter, self._note).serve, LIMIT)

    def _gpg(self) -> AgentServer:
        from cloister.credentials.gpg_agent import GpgAgentFilter
        from cloister.relay.gpg_agent import LIMIT, GpgAgentClients

        def make_filter() -> GpgAgentFilter:
            return GpgAgentFilter(self._sources.agent, self._sources.gpg_grants)

        return AgentServer(GpgAgentClients(self._sources.gpg, self._uid, make_filter, self._note).serve, LIMIT)
