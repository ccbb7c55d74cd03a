"""What the system's broker does with a connection: runs that hostd asks for, and what root's own verbs ask.

Only root gets here (`proxyd` looks at each peer), and only hostd sends `verb=run`. Errors are told as the final
frame `F`: to hostd while the unit is not there, which hands it to the caller, and over the lease afterwards.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import msgspec

from cloister.errors import CloisterError, render
from cloister.host.owner import Owner
from cloister.runs.hostd import Hostd
from cloister.runs.paths import Paths
from cloister.runs.request import Incoming
from cloister.runs.unit_asked import decode_asked
from cloister.runs.unit_lease import Lease
from cloister.runs.unit_prepare import UnitKitchen
from cloister.runs.unit_supervise import Parties, PassedError, UnitSupervisor, check_parties
from cloister.services.connection import Connection
from cloister.services.intake import BUG_AT_START, Intake
from cloister.services.uncaught import log_bug


class SystemRequests(Intake):
    """All connections of the system's broker."""

    bug = b"cloister: a bug in the system's broker; its journal has the traceback [broker-bug]\n"

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, owner: Owner, hostd: str) -> None:
        """Recover crashed runs, then be ready."""
        super().__init__(loop)
        self._hostd = Hostd(loop, self._connect, hostd)
        self._supervisor = UnitSupervisor(loop, UnitKitchen(paths, owner), self._connect, self._hostd)
        self._supervisor.on_audit(lambda: self._begin(self.serve_gateways()))
        self._supervisor.recover()

    def accept(self, sock: socket.socket) -> None:
        """Take a new connection of root's."""
        self.take(sock)

    async def recover_units(self) -> None:
        """Have hostd end what a killed broker of ours has left; where it cannot be asked, the journal says so."""
        try:
            await self._supervisor.recover_units()
        except CloisterError as error:
            sys.stderr.write(render(error) + "\n")

    def reload(self) -> None:
        """Bring the system's policy as it is now to every living run."""
        for result in self._supervisor.control("reload", {})["reloaded"]:
            if "error" in result:
                sys.stderr.write(f"run {result['run']} keeps its old policy: {result['error']}\n")
        sys.stderr.flush()
        self._begin(self.serve_gateways())

    async def serve_gateways(self) -> None:
        """Serve the gateways of the policy as it is now; the journal says which cannot be."""
        try:
            complaints = await self._supervisor.gateways.serve()
        except CloisterError as error:  # no policy yet, or a broken one: runs are refused for it as well
            complaints = [render(error)]
        for complaint in complaints:
            sys.stderr.write(f"{complaint}\n")
        sys.stderr.flush()

    async def close(self) -> None:
        """End all runs."""
        await self._supervisor.close()

    def _dispatch(  # type: ignore[explicit-override]  # typing.override: Python 3.12
        self, connection: Connection, incoming: Incoming, environment: list[bytes]
    ) -> None:
        if incoming.fields.get("verb") == "run":
            self._incoming.pop(connection)
            self._begin(self._start(connection, incoming, environment))
            return
        answer = self._supervisor.control(incoming.fields.get("verb", ""), incoming.fields)
        connection.send("J", msgspec.json.encode(answer))
        connection.close()

    async def _start(self, connection: Connection, incoming: Incoming, environment: list[bytes]) -> None:
        """Start a run for hostd. Before the plan is sent, refusals are hostd's to hand on; afterwards the lease's."""
        parties: Parties | None = None
        try:
            check_parties(incoming.descriptors)
            outer, lease, *stdio = (os.dup(descriptor) for descriptor in incoming.descriptors)
            parties = Parties(
                hostd=connection,
                outer=Connection(self._loop, socket.socket(fileno=outer), lambda *_: None, lambda _: None),
                lease=Lease(self._loop, self._connect, socket.socket(fileno=lease)),
                stdio=tuple(stdio),
            )
            asked = decode_asked(incoming.fields, incoming.part, incoming.words, environment)
            incoming.close()
            await self._supervisor.start(asked, parties)
        except PassedError as passed:
            _tell(connection, parties, passed.payload)
        except CloisterError as error:
            code = error.exit_code if error.exit_code in (126, 127) else 125
            _tell(connection, parties, bytes([code]) + (render(error) + "\n").encode("utf-8", "backslashreplace"))
        except Exception:  # noqa: BLE001  # a bug must not take the other runs down
            log_bug()
            _tell(connection, parties, BUG_AT_START + self.bug)
        finally:
            incoming.close()
            for descriptor in parties.stdio if parties else ():
                os.close(descriptor)
            connection.close()

    def _refuse(self, connection: Connection, error: CloisterError) -> None:  # type: ignore[explicit-override]  # Python 3.12
        connection.send("F", bytes([error.exit_code]) + (render(error) + "\n").encode("utf-8", "backslashreplace"))
        connection.close()


def _tell(connection: Connection, parties: Parties | None, payload: bytes) -> None:
    """Say that nothing was started: to hostd, until it has a plan and leaves the caller to us."""
    if parties and parties.lease.leads:
        parties.lease.refuse(payload)
    else:
        connection.send("F", payload)
    if parties:
        parties.lease.close()
        parties.outer.close()
