"""The filtered agent sockets of one run, from its start to its end: filters, sockets and records put together."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from cloister.credentials.signing import SigningEvent
from cloister.relay.agent_sockets import AgentServer
from cloister.runs.signing_model import Sources


class Signers:
    """The sockets on which a run's programs have signatures made."""

    def __init__(self, sources: Sources, uid: int, record: Callable[[SigningEvent], None]) -> None:
        """Know the person's agents; serve nothing yet."""
        self._sources = sources
        self._uid = uid
        self._record = record
        self._servers: list[AgentServer] = []

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

    def _ssh(self) -> AgentServer:
        from cloister.credentials.ssh_agent import Ring, SshAgentFilter
        from cloister.relay.ssh_agent import LIMIT, SshAgentClients

        ring = self._sources.ring or Ring(self._sources.agent, (), {})
        clients = SshAgentClients(self._sources.ssh, self._uid, lambda: SshAgentFilter(ring), self._record)
        return AgentServer(clients.serve, LIMIT)

    def _gpg(self) -> AgentServer:
        from cloister.credentials.gpg_agent import GpgAgentFilter
        from cloister.relay.gpg_agent import LIMIT, GpgAgentClients

        agent, grants = self._sources.agent, self._sources.gpg_grants
        clients = GpgAgentClients(self._sources.gpg, self._uid, lambda: GpgAgentFilter(agent, grants), self._record)
        return AgentServer(clients.serve, LIMIT)
